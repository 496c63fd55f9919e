"""A profiler trace of one step of a rank, and a table of where its time went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def trace(rank: int, folder: Path, step: Callable[[], Any], name: str) -> None:
    """Write a trace of one step of the first rank, and a table of the operators that took longest."""
    is_cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if is_cuda:
            torch.cuda.synchronize()
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        key = "self_cuda_time_total" if is_cuda else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)
        (folder / f"{name}.txt").write_text(table)
        profile.export_chrome_trace(str(folder / f"{name}.json.gz"))
    dist.barrier()
