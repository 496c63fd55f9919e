"""Pool: jobs in processes of their own, several at once, each with limits of time and memory.

A server process imports torch and transformers once and forks one worker for each job, so that a model that hangs, runs out
of memory or ends its process costs its own results only.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from cpcompile.zoo.result import CRASH, Result
from cpcompile.zoo.run import Job, run_job

GIB = 2**30
Runner = Callable[[Job, Callable[[Result], None]], None]


@dataclass
class Worker:
    """A process that runs one job, and what it still owes."""

    job: Job
    process: ForkServerProcess
    connection: Connection
    deadline: float
    results: list[Result] = field(default_factory=list)

    def rest(self, reason: str) -> Iterator[Result]:
        """Yield a crash for each variant without a result."""
        done = {result.variant for result in self.results}
        yield from (Result(self.job.key, v, CRASH, reason) for v in self.job.variants if v not in done)


def run_jobs(
    jobs: Sequence[Job],
    report: Callable[[Job, list[Result]], None],
    *,
    num_workers: int,
    timeout: float,
    memory: float,
    run: Runner = run_job,
) -> None:
    """Run all jobs and report each with its results when it has ended; interrupted, also those that have some.

    Args:
        jobs: what to run, in this order.
        report: called in this process.
        num_workers: processes at once.
        timeout: seconds that one variant may take.
        memory: GiB of data that one process may hold.
        run: what a worker does; it must be importable by name.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cpcompile.zoo.preload"])
    # What is preloaded asks whether there are GPUs. The CUDA runtime would answer, and be of no use to the workers after.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    waiting = list(reversed(jobs))
    workers: list[Worker] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < num_workers:
                workers.append(start(context, waiting.pop(), run, timeout, memory))
            soonest = min(worker.deadline for worker in workers)
            wait([w.connection for w in workers], timeout=max(0.0, soonest - time.monotonic()))
            for worker in list(workers):
                if has_ended(worker, timeout):
                    workers.remove(worker)
                    report(worker.job, worker.results)
    finally:
        for worker in workers:
            stop(worker)
            report(worker.job, worker.results)


def start(context: Any, job: Job, run: Runner, timeout: float, memory: float) -> Worker:
    """Start a worker."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(run, job, theirs, memory), daemon=True)
    process.start()
    theirs.close()
    return Worker(job, process, ours, time.monotonic() + timeout)


def has_ended(worker: Worker, timeout: float) -> bool:
    """Take what a worker has sent; tell whether it has ended, by itself or because its time was over."""
    while worker.connection.poll():
        try:
            worker.results.append(worker.connection.recv())
        except EOFError:
            worker.process.join()
            worker.results += worker.rest(f"the process ended with exit code {worker.process.exitcode}")
            return True
        worker.deadline = time.monotonic() + timeout
    if time.monotonic() < worker.deadline:
        return False
    stop(worker)
    worker.results += worker.rest(f"no result within {timeout:.0f} s")
    return True


def stop(worker: Worker) -> None:
    """End a worker now."""
    worker.process.kill()
    worker.process.join()


def work(run: Runner, job: Job, connection: Connection, memory: float) -> None:
    """Run one job in a worker."""
    limit = int(memory * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the model and torch print
        os.dup2(nowhere, stream)
    # Ctrl-C reaches every process of the terminal; the first process ends the others.
    with contextlib.suppress(KeyboardInterrupt):
        run(job, connection.send)
    connection.close()
