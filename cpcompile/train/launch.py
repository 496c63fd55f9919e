"""Launch: start the local ranks, pass on what they report, and end all of them when one fails."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from cpcompile.errors import CPError
from cpcompile.train import loop
from cpcompile.train.events import Event, Failed, Finished
from cpcompile.train.model import first_line
from cpcompile.train.options import TrainOptions

# After the first failure, how long to wait for the others': a rank that was killed takes its neighbours' connections with it,
# and theirs may be reported first.
GRACE_SECONDS = 1.0
STOP_SECONDS = 5.0
# The reference step of rank 0 keeps the others waiting.
TIMEOUT = datetime.timedelta(hours=1)
_CONNECTION = re.compile(r"connection|peer|gloo|NCCL|socket|timed out", re.IGNORECASE)


class RankError(CPError):
    """A rank ended early."""


@dataclass(slots=True, eq=False)
class Rank:
    """A process that the launcher started, and what it said last."""

    number: int
    process: SpawnProcess
    connection: Connection
    is_open: bool = True
    is_finished: bool = False
    failure: Failed | None = field(default=None)


def launch(options: TrainOptions, report: Callable[[Event], None]) -> None:
    """Train on `options.ranks` new local processes. Raises `RankError` when one of them fails, after ending the others."""
    context = multiprocessing.get_context("spawn")
    ranks: list[Rank] = []
    with tempfile.TemporaryDirectory(prefix="cpcompile-") as folder, terminate_as_exit():
        try:
            for number in range(options.ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=rank_main, args=(number, options, sender, f"{folder}/store"), name=f"rank {number}"
                )
                process.start()
                sender.close()
                ranks.append(Rank(number, process, receiver))
            supervise(ranks, report)
        finally:
            stop(ranks)


def supervise(ranks: list[Rank], report: Callable[[Event], None]) -> None:
    """Pass on events until all ranks have finished; raise `RankError` for the failure that came first."""
    deadline = float("inf")
    while not all(rank.is_finished for rank in ranks):
        waiting: list[Any] = [rank.connection for rank in ranks if rank.is_open]
        wait(waiting, timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        for rank in ranks:
            receive(rank, report)
        if deadline == float("inf") and any(rank.failure for rank in ranks):
            deadline = time.monotonic() + GRACE_SECONDS
        failures = [rank.failure for rank in ranks if rank.failure is not None]
        if failures and (time.monotonic() >= deadline or len(failures) == len(ranks)):
            raise as_error(root_cause(failures))


def receive(rank: Rank, report: Callable[[Event], None]) -> None:
    """Take all that `rank` has sent; its death is a failure unless it had finished."""
    try:
        while rank.is_open and rank.connection.poll():
            match rank.connection.recv():
                case Failed() as failure:
                    rank.failure = failure
                case Finished():
                    rank.is_finished = True
                case event:
                    report(event)
    except (EOFError, OSError):
        # The process has closed its end, so it is about to be gone.
        rank.is_open = False
        rank.process.join(STOP_SECONDS)
    if not rank.is_open and not rank.is_finished and rank.failure is None:
        rank.failure = Failed(rank.number, exit_reason(rank.process.exitcode), "", False, time.time())


def exit_reason(code: int | None) -> str:
    """Say in words how a process ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code} before its last step"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def root_cause(failures: list[Failed]) -> Failed:
    """Return the failure that made the others: a death, else an error that is no lost connection, else the first."""

    def order(failure: Failed) -> tuple[bool, bool, float]:
        is_death = failure.text.startswith("was killed")
        return not is_death, not failure.is_user_error and bool(_CONNECTION.search(failure.text)), failure.time

    return min(failures, key=order)


def as_error(failure: Failed) -> RankError:
    """Return the error for a failure: a user's error speaks for itself, others name their rank."""
    if failure.is_user_error:
        return RankError(failure.text)
    error = RankError(f"rank {failure.rank} {failure.text}; all ranks were ended.")
    if failure.traceback:
        error.__cause__ = RuntimeError(failure.traceback)
    return error


def stop(ranks: list[Rank]) -> None:
    """End all processes: those that have finished get a while to leave by themselves."""
    deadline = time.monotonic() + STOP_SECONDS
    if all(rank.is_finished for rank in ranks):
        for rank in ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
    for action in (SpawnProcess.terminate, SpawnProcess.kill):
        deadline = time.monotonic() + STOP_SECONDS
        alive = [rank.process for rank in ranks if rank.process.is_alive()]
        for process in alive:
            action(process)
        for process in alive:
            process.join(max(0.0, deadline - time.monotonic()))
    for rank in ranks:
        rank.connection.close()


@contextlib.contextmanager
def terminate_as_exit() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the ranks are ended on the way out."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rank_main(rank: int, options: TrainOptions, connection: Connection, store: str) -> None:
    """What a started process runs: train, and say how it ended."""
    # Ctrl-C reaches the whole terminal; the launcher ends the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    # tqdm, which torch imports, would share a semaphore between processes, and Python complains about it when a rank is ended.
    tqdm.set_lock(threading.RLock())
    if sys.platform == "linux":
        # Local ranks meet on the loopback device; the host's own name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    emit = connection.send if rank == 0 else ignore
    try:
        with process_group(options, rank, options.ranks, rank, f"file://{store}") as device:
            loop.train(options, rank, device, emit)
        connection.send(Finished(rank))
    except BaseException as error:
        connection.send(failed(rank, error))
        # Threads of torch and Inductor may wait for ranks that are gone: leave without asking them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def failed(rank: int, error: BaseException) -> Failed:
    """Describe an error of a rank."""
    is_user_error = isinstance(error, CPError)
    text = str(error) if is_user_error else f"failed with {first_line(error)}"
    return Failed(rank, text, "".join(traceback.format_exception(error)), is_user_error, time.time())


def exit_with_parent() -> None:
    """Leave when the launcher is gone, whatever ended it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def ignore(event: Event) -> None:
    """Drop an event: ranks other than 0 report failures only."""


@contextlib.contextmanager
def process_group(
    options: TrainOptions, rank: int, world_size: int, local_rank: int, init_method: str
) -> Iterator[torch.device]:
    """Join the ranks, set this one's device and threads, and leave at the end."""
    device, backend = torch.device("cpu"), "gloo"
    if options.device == "cuda":
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, loop.num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    dist.init_process_group(backend, init_method=init_method, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield device
    finally:
        # After an error the others may be gone, and a group that waits for them does not end.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def is_launched() -> bool:
    """Whether torchrun, or the like, has started this process as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(options: TrainOptions, report: Callable[[Event], None]) -> None:
    """Train as one of the ranks that torchrun started."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    try:
        with process_group(options, rank, world_size, local_rank, "env://") as device:
            loop.train(options, rank, device, report if rank == 0 else ignore)
    except Exception as error:
        raise as_error(failed(rank, error)) from error
