"""A pool of gloo ranks that lives as long as tests in a row need it.

    def job(rank, x): ...                       # a module-level function of a test file
    results = pool.run(3, job, x)               # [job(Rank(0), x), job(Rank(1), x), job(Rank(2), x)]

`job` runs at once in ranks 0 .. world_size-1, each with its `Rank`: `rank.group` is the name of their process group and
`rank.mesh()` a 1-D DeviceMesh over it. Arguments and results are pickled, so use tensors and plain data. A rank that raises fails
the test with its traceback; a job that takes longer than `timeout` seconds fails too, and the next one gets fresh processes.
"""

from __future__ import annotations

import importlib.util
import inspect
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

# For models of one or two layers this cache of torch costs a quarter of the time of a capture, and saves nothing.
torch._dynamo.config.fake_tensor_cache_enabled = False
NUM_RANKS = 4
# What every rank would import by itself, for seconds: one process does so once, and ranks are forked from it.
PRELOADED = ["torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "cpcompile.front.apply"]
PRELOADED += ["transformers.models.llama.modeling_llama"]
GRACE = 3.0  # seconds that the other ranks get to report, once one has failed


@dataclass(frozen=True, slots=True)
class Rank:
    """This process's place in the ranks that run a job."""

    rank: int
    world_size: int
    process_group: Any
    pairs: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """The name of the process group; empty for one rank, which must not use it."""
        return str(self.process_group.group_name) if self.world_size > 1 else ""

    def grid(self, inner: int) -> tuple[str, str]:
        """Return the groups of this rank along both axes of a grid of (ranks / inner, inner): inner first, '' for one rank."""
        if inner in (1, self.world_size):
            return (self.group, "") if inner > 1 else ("", self.group)
        assert (self.world_size, inner) == (4, 2)
        row, column = self.rank // 2 * 2, self.rank % 2
        names = [self.pairs[pair].group_name for pair in ((row, row + 1), (column, column + 2))]
        return str(names[0]), str(names[1])

    def mesh(self, axis: str = "cp") -> DeviceMesh:
        """Return a mesh of one axis over the ranks."""
        return DeviceMesh.from_group(self.process_group, "cpu", mesh_dim_names=(axis,))


def _load(path: str, name: str) -> Callable[..., Any]:
    """Return a function of the file `path`; the file is loaded once in each process."""
    key = f"_pool_{path}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None and spec.loader is not None
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    function: Callable[..., Any] = getattr(sys.modules[key], name)
    return function


def _serve(rank: int, store: str, jobs: Connection) -> None:
    """Run jobs until the pipe closes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, NUM_RANKS), rank=rank, world_size=NUM_RANKS, timeout=timedelta(seconds=150)
    )
    groups = {size: dist.new_group(range(size)) for size in range(1, NUM_RANKS + 1)}
    pairs = {(a, b): dist.new_group([a, b]) for a in range(NUM_RANKS) for b in range(a + 1, NUM_RANKS)}
    kept = set(distributed_c10d._world.pg_map)
    while True:
        try:
            world_size, path, name, args = pickle.loads(jobs.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, _load(path, name)(Rank(rank, world_size, groups[world_size], pairs), *args))
        except Exception:
            answer = (False, traceback.format_exc())
        jobs.send_bytes(pickle.dumps(answer))
        if answer[0]:
            _forget_groups(kept, groups[world_size])


def _forget_groups(kept: Collection[Any], ranks: Any) -> None:
    """Destroy the groups that a job made, when all its ranks are done: each costs threads that wake up all the time.

    DTensor's cache gives what it makes the mesh of an equal, earlier call, whose groups are gone then.
    """
    dist.barrier(ranks)
    for group in [group for group in distributed_c10d._world.pg_map if group not in kept]:
        dist.destroy_process_group(group)
    _clear_sharding_prop_cache()


class Pool:
    """Starts its ranks with the first job."""

    started: ClassVar[list[Pool]] = []

    def __init__(self) -> None:
        self.started.append(self)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store = ""

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = store = tempfile.mktemp(prefix="cpcompile_pool_")
        for rank in range(NUM_RANKS):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(pipe)

    def stop(self) -> None:
        """End the ranks; the next job starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._processes:
            Path(self._store).unlink(missing_ok=True)
        self._processes, self._pipes = [], []

    def run(self, world_size: int, job: Callable[..., Any], *args: Any, timeout: float = 150.0) -> list[Any]:
        """Return `job(rank, *args)` of every rank, in their order."""
        if not self._processes:
            self._start()
            timeout += 60.0  # the ranks import torch first
        message = pickle.dumps((world_size, inspect.getfile(job), job.__name__, args))
        pipes = self._pipes[:world_size]
        for pipe in pipes:
            pipe.send_bytes(message)
        answers = self._collect(pipes, timeout)
        failed = {rank: text for rank, (ok, text) in sorted(answers.items()) if not ok}
        missing = [rank for rank in range(world_size) if rank not in answers]
        if failed or missing:
            self.stop()  # messages of the failed job may still be on their way
            texts = [f"rank {rank}:\n{text}" for rank, text in failed.items()]
            texts += [f"ranks {missing} did not answer within {timeout:.0f} s"] if missing and not failed else []
            raise AssertionError(f"{job.__name__} on {world_size} ranks\n" + "\n".join(texts))
        return [answers[rank][1] for rank in range(world_size)]

    def _collect(self, pipes: list[Connection], timeout: float) -> dict[int, tuple[bool, Any]]:
        """Return the answers by rank; those of ranks that die or hang are missing."""
        answers: dict[int, tuple[bool, Any]] = {}
        waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
        deadline = time.monotonic() + timeout
        while waiting and time.monotonic() < deadline:
            for pipe in wait(list(waiting), timeout=max(deadline - time.monotonic(), 0)):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    answers[rank] = (False, "the process died")
                if not answers[rank][0]:
                    # The others may wait for this rank in a collective that will never complete.
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers
