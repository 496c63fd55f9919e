"""Verify real: start a process for each rank, and say what they find or how one ended."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cpcompile.errors import CPError, InputError, RankFailed
from cpcompile.inspect.sweep import FAILED, Case
from cpcompile.options.config import Config
from cpcompile.processes.rank_run import RankRun

Make = Callable[[], tuple[torch.nn.Module, Mapping[str, Any]]]


def verify_real(
    make: Make,
    *,
    world_size: int,
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    **options: Any,
) -> Case:
    """Start a process for each rank, and compare the applied model with the untouched one on rank 0: loss, gradients, buffers.

    Unlike `verify` it runs what training runs: messages, kernels and the inner compiler.

    Args:
        make: a function of a module, without arguments, that returns the model and its inputs; each rank calls it.
        world_size: ranks to start, all on this host.
        inner_size: how many of them exchange heads in `strategy="usp"`, where they are a grid.
        dtype: of the model and its inputs; their own by default.
        tolerance: largest relative error; by default that of `verify`.
        device: `cpu` (gloo), `cuda` (NCCL, a GPU for each rank), or `auto`: GPUs where there are enough.
        options: the fields of `cpcompile.Config`. A model without a loss returns its outputs whole.

    Returns:
        The comparison. Its verdict is `refused` for a `CPError` of any rank, and `failed` where a rank died, which its text
        names, with the traceback.

    Raises:
        ConfigError: an option that does not fit, or too few GPUs.
    """
    Config.of(options).check_axis(inner_size)
    kind = device_kind(device, world_size)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    with tempfile.TemporaryDirectory(prefix="cpcompile-") as folder, quiet():
        try:
            found = elastic_launch(config, run_rank)(make, kind, inner_size, dtype, tolerance, options, folder)
        except ChildFailedError as error:
            text = death(error, Path(folder), world_size)
            return Case(world_size=world_size, tokens=0, verdict=FAILED, text=text, error=type(error).__name__)
    errors = [case for case in found.values() if case is not None and case.error]
    # What ended a rank first ends the others too, which know nothing else.
    own = [case for case in errors if case.error != RankFailed.__name__]
    case: Case = (own or errors or [found[0]])[0]
    return case


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the launcher from logging: how a rank ended is in the result."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def death(error: ChildFailedError, folder: Path, world_size: int) -> str:
    """Return which rank died first, and why: by a signal, or by an exception that it left in `folder`."""
    rank, failure = error.get_first_failure()
    left = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    if failure.exitcode < 0 or not left:
        return f"rank {rank} of {world_size} died: {failure.message}"
    # The others fail after it, by what they can no longer reach.
    return f"rank {left[0].name} of {world_size} died:\n\n{left[0].read_text()}"


def device_kind(device: str, world_size: int) -> str:
    """Return `cpu` or `cuda`.

    Raises:
        InputError: there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and count < world_size:
        raise InputError(f"{world_size} ranks need as many GPUs, and there are {count}: use device='cpu'.")
    return "cuda" if device != "cpu" and count >= world_size else "cpu"


def run_rank(
    make: Make,
    kind: str,
    inner_size: int,
    dtype: torch.dtype | None,
    tolerance: float | None,
    options: dict[str, Any],
    folder: str,
) -> Case | None:
    """Be one of the ranks; return what the first found, or the refusal that ended this one. Others are left in `folder`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if sys.platform == "linux":
        # Local ranks meet on the loopback device; the host's own name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        model, inputs = make()
        run = RankRun(model, inputs, device, dtype, Config.of(options), tolerance)
        found = run.compare(inner_size, options)
        dist.destroy_process_group()
        return found
    except CPError as error:
        return Case.of_error(error, world_size, 0)
    except Exception:
        (Path(folder) / str(rank)).write_text(traceback.format_exc())
        raise
