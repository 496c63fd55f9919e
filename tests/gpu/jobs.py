"""Jobs: a process for each rank, all cases in one run, what each rank finds of a case on disk before the next one starts."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

Result = dict[str, Any]


@dataclass(frozen=True)
class Named:
    """A case; its text names the files of its results."""

    def __str__(self) -> str:
        return "-".join(map(str, asdict(self).values())).replace(":", "_")


def run_ranks(work: Callable[..., None], world_size: int, folder: str, limit: float) -> None:
    """Run `work(rank, world_size, folder)` in so many processes; end those that take more than `limit` seconds."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, world_size, folder)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + limit
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


def run_cases(cases: Iterable[Any], rank: int, folder: str, run: Callable[[Any], Result]) -> None:
    """Run all cases on one rank."""
    for case in cases:
        start = time.perf_counter()
        try:
            result = run(case)
        except Exception:
            result = {"failed": traceback.format_exc()}
        result["seconds"] = time.perf_counter() - start
        Path(folder, f"{case}.{rank}.json").write_text(json.dumps(result))


def results_of(case: Any, world_size: int, folder: Path) -> list[Result]:
    """Return what each rank found; a rank without a result fails the test."""
    found = []
    for rank in range(world_size):
        path = folder / f"{case}.{rank}.json"
        assert path.exists(), f"rank {rank} ended before this case, or hangs in it"
        found.append(json.loads(path.read_text()))
        assert "failed" not in found[-1], f"rank {rank}: {found[-1]['failed']}"
    return found
