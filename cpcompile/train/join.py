"""Join: be one of the ranks that torchrun, or the like, has started."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields

import torch.distributed as dist

from cpcompile.errors import ConfigError, StorageError
from cpcompile.front.messages import print_messages, print_messages_on, start_on
from cpcompile.train import loop
from cpcompile.train.events import Event, Note
from cpcompile.train.failures import as_error, failed, is_lost_connection, is_timeout
from cpcompile.train.group import process_group
from cpcompile.train.heartbeat import NeighbourWatch
from cpcompile.train.interrupt import Interrupt, Interrupted, catching
from cpcompile.train.options import TrainOptions, flag

# What may differ: only rank 0 writes a log and tracks, and paths, devices and compilers are those of the host.
_OWN = ("log", "report_to", "save", "model", "text", "dataset", "device", "inner")


def is_launched() -> bool:
    """Whether torchrun, or the like, has started this process as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(options: TrainOptions, report: Callable[[Event], None]) -> None:
    """Train as one of the ranks that torchrun started. Raises a `CPError`, or `Interrupted` after a signal."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    interrupt = Interrupt(is_patient=False)

    def emit(event: Event) -> None:
        if rank != 0:
            return
        try:
            report(event)
        except StorageError as error:
            end_after_step(interrupt, error)

    try:
        with (
            catching(interrupt),
            process_group(options, rank, world_size, local_rank, "env://") as device,
            watched(rank, world_size, options.heartbeat, emit),
        ):
            everyone: list[TrainOptions] = [options] * world_size
            dist.all_gather_object(everyone, options)
            check_same_options(everyone)
            loop.train(options, rank, device, emit, interrupt)
    except Interrupted as end:
        if interrupt.error is not None:
            raise StorageError(f"{interrupt.error} The run {end.text}") from interrupt.error
        raise
    except Exception as error:
        if interrupt.number and is_lost_connection(str(error)):
            raise Interrupted(interrupt.number, "the other ranks were gone first.") from error
        if is_timeout(str(error)):
            print_messages()
        raise as_error(failed(rank, error)) from error


def check_same_options(everyone: list[TrainOptions]) -> None:
    """Refuse ranks that were started with different options: they would wait for each other, or mix what they compute."""
    names = [field.name for field in fields(TrainOptions) if field.name not in _OWN]
    for rank, options in enumerate(everyone):
        changed = [
            f"{flag(name)} {getattr(options, name)} on rank {rank} and {getattr(everyone[0], name)} on rank 0"
            for name in names
            if getattr(options, name) != getattr(everyone[0], name)
        ]
        if changed:
            raise ConfigError(f"the ranks were started with different options: {'; '.join(changed)}.")


def end_after_step(interrupt: Interrupt, error: StorageError) -> None:
    """The log cannot be written: all ranks end after this step, as after a signal. Raises where nothing can be saved."""
    if not interrupt.is_patient:
        raise error
    interrupt.error = interrupt.error or error
    interrupt.number = interrupt.number or signal.SIGTERM


@contextlib.contextmanager
def watched(rank: int, world_size: int, limit: float, emit: Callable[[Event], None]) -> Iterator[None]:
    """Watch the next rank, and be watched by the one before, until the end."""
    if limit <= 0 or world_size == 1:
        print_messages_on(signal.SIGUSR1)
        yield
        return
    try:
        met = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)  # type: ignore[attr-defined]
    except (KeyError, RuntimeError):
        print_messages_on(signal.SIGUSR1)
        emit(Note("the ranks did not meet by MASTER_ADDR and MASTER_PORT: one that is stopped goes unnoticed."))
        yield
        return
    # torchrun may start the ranks again and keep the store.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"cpcompile heartbeat {restart}", met)  # type: ignore[attr-defined]
    watch = NeighbourWatch(store, rank, world_size, limit)
    watch.start()
    start_on(signal.SIGUSR1, watch.answer)
    try:
        yield
    finally:
        watch.stop()
