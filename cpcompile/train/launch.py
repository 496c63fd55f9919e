"""Launch: start the local ranks, pass on what they report, and end all of them when one fails or falls silent.

torchrun does without this (`join`). Its agent sees when a process ends, but neither one that is stopped nor which error came
first, and gives a rank that saves after a signal 30 seconds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from cpcompile.errors import CPError, StorageError
from cpcompile.front.message_comparison import compare_messages
from cpcompile.front.messages import Messages, newest_messages, print_messages, start_on
from cpcompile.train import checkpoint, loop
from cpcompile.train.events import Beat, Event, Failed, Finished, Note, Phase, Step
from cpcompile.train.failures import RankError, as_error, died, failed, is_timeout, root_cause
from cpcompile.train.group import process_group
from cpcompile.train.heartbeat import START_SECONDS, Watch, interval, silence, start_beating, state_of
from cpcompile.train.interrupt import Interrupt, Interrupted, catching, name_of
from cpcompile.train.options import TrainOptions

# After the first failure, how long to wait for the others': a rank that was killed takes its neighbours' connections with it,
# and theirs may be reported first.
GRACE_SECONDS = 1.0
# How long ranks get to print their last messages and tell them.
ANSWER_SECONDS = 1.0
STOP_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Rank:
    """A process that the launcher started, and what it said last."""

    number: int
    process: SpawnProcess
    connection: Connection
    is_open: bool = True
    is_finished: bool = False
    failure: Failed | None = field(default=None)
    messages: Messages | None = field(default=None)  # from the first beat on, when it also hears SIGUSR1


def launch(options: TrainOptions, report: Callable[[Event], None]) -> None:
    """Train on `options.ranks` new local processes.

    Raises `RankError` when one of them fails, `StorageError` when the log cannot be written, and `Interrupted` after a signal,
    when no rank is left.
    """
    context = multiprocessing.get_context("spawn")
    ranks: list[Rank] = []
    interrupt = Interrupt()
    report(Phase(f"starting {options.ranks} rank{'s' if options.ranks > 1 else ''}"))
    with tempfile.TemporaryDirectory(prefix="cpcompile-") as folder, catching(interrupt):
        try:
            for number in range(options.ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=rank_main, args=(number, options, sender, f"{folder}/store"), name=f"rank {number}"
                )
                process.start()
                sender.close()
                ranks.append(Rank(number, process, receiver))
            supervisor = Supervisor(options, ranks, report, interrupt)
            with catching(supervisor.ask, signal.SIGUSR1):
                supervisor.run()
        finally:
            stop(ranks)


class Supervisor:
    """Passes on the events of the ranks until all have finished, and decides when and why a run ends early."""

    def __init__(
        self, options: TrainOptions, ranks: list[Rank], report: Callable[[Event], None], interrupt: Interrupt
    ) -> None:
        self.options, self.ranks, self.report, self.interrupt = options, ranks, report, interrupt
        self.watch = Watch([rank.number for rank in ranks], options.heartbeat, START_SECONDS)
        self.num_steps = 0
        self.is_ending = False
        self.is_asked = False
        self.error: CPError | None = None

    def run(self) -> None:
        """Return when all ranks have finished; raise for the failure that came first."""
        deadline = float("inf")
        while not all(rank.is_finished for rank in self.ranks):
            waiting: list[Any] = [rank.connection for rank in self.ranks if rank.is_open]
            wait(waiting, timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            for rank in self.ranks:
                self.receive(rank)
            failures = [rank.failure for rank in self.ranks if rank.failure is not None]
            if failures and deadline == float("inf"):
                deadline = time.monotonic() + GRACE_SECONDS
            if failures and (time.monotonic() >= deadline or len(failures) == len(self.ranks)):
                first = root_cause(failures)
                if is_timeout(first.text):
                    self.show_messages()
                raise self.reason(first)
            if not failures:
                self.check_silence()
            if self.is_asked:
                self.is_asked = False
                self.show_messages()
            if self.interrupt.number or self.error is not None:
                self.end_early()

    def receive(self, rank: Rank) -> None:
        """Take all that `rank` has sent; its death is a failure unless it had finished."""
        while rank.is_open:
            try:
                if not rank.connection.poll():
                    break
                event = rank.connection.recv()
            except (EOFError, OSError):
                # The process has closed its end, so it is about to be gone.
                rank.is_open = False
                rank.process.join(STOP_SECONDS)
                break
            self.watch.hear(rank.number)
            match event:
                case Beat(messages=messages):
                    rank.messages = messages
                case Failed() as failure:
                    rank.failure = failure
                case Finished():
                    rank.is_finished = True
                    self.watch.forget(rank.number)
                case _:
                    self.show(event)
        if not rank.is_open and not rank.is_finished and rank.failure is None:
            rank.failure = died(rank.number, rank.process.exitcode)

    def show(self, event: Event) -> None:
        """Pass on an event. A log that cannot be written ends the run, after a checkpoint."""
        if isinstance(event, Step):
            self.num_steps += 1
        try:
            self.report(event)
        except StorageError as error:
            self.error = self.error or error

    def check_silence(self) -> None:
        """Raise when a rank gave no sign of life for too long."""
        silent = [self.ranks[number] for number in self.watch.silent()]
        if silent:
            who = " and ".join(f"rank {rank.number}" for rank in silent)
            states = "; ".join(state_of(rank.process.pid) for rank in silent)
            self.show_messages()
            raise RankError(silence(who, self.options.heartbeat, states) + self.resumable())

    def ask(self, number: int, frame: Any = None) -> None:
        """Show the messages soon: what SIGUSR1 does."""
        self.is_asked = True

    def show_messages(self) -> None:
        """Have the ranks print their last messages, and say which of them is behind."""
        for rank in self.ranks:
            if rank.messages is not None and rank.is_open and rank.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, signal.SIGUSR1)
        time.sleep(ANSWER_SECONDS)
        for rank in self.ranks:
            self.receive(rank)
        line = compare_messages({rank.number: rank.messages for rank in self.ranks if rank.messages is not None})
        if line:
            self.show(Note(line))

    def end_early(self) -> None:
        """Have the ranks save a checkpoint and end; raise at once when there is nothing to save, or no patience."""
        number = self.interrupt.number
        if self.interrupt.is_urgent or self.options.save is None or not self.num_steps:
            what = "nothing was saved" if self.options.save is None else "steps after the last checkpoint are lost"
            raise self.error or Interrupted(number, f"all ranks were ended; {what}.{self.resumable()}")
        if not self.is_ending:
            self.is_ending = True
            again = " (Ctrl-C again ends at once)" if number == signal.SIGINT else ""
            name = name_of(number) if number else "the log cannot be written"
            self.show(Note(f"{name}: saving a checkpoint after this step{again}."))
            for rank in self.ranks:
                rank.process.terminate()

    def reason(self, failure: Failed) -> BaseException:
        """Return what to raise for a failure: what this process knows better comes first."""
        error = as_error(failure, self.resumable())
        if isinstance(error, Interrupted):
            if self.error is not None:
                return StorageError(f"{self.error} The run {error.text}")
            # The ranks know only of the SIGTERM that they were sent.
            return Interrupted(self.interrupt.number or error.number, error.text)
        return error

    def resumable(self) -> str:
        """Return after which step --resume would go on, or ''."""
        found = checkpoint.find(self.options.save) if self.options.save is not None else []
        return f" --resume continues after step {found[-1][0]}." if found else ""


def stop(ranks: list[Rank]) -> None:
    """End all processes: those that have finished get a while to leave by themselves."""
    deadline = time.monotonic() + STOP_SECONDS
    if all(rank.is_finished for rank in ranks):
        for rank in ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
    # SIGTERM would ask them to save, and one that is stopped would not even hear it.
    for rank in ranks:
        rank.process.kill()
    for rank in ranks:
        rank.process.join(STOP_SECONDS)
        rank.connection.close()


def rank_main(rank: int, options: TrainOptions, connection: Connection, store: str) -> None:
    """What a started process runs: train, and say how it ended."""
    # Ctrl-C reaches the whole terminal; the launcher asks the ranks to end, by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt = Interrupt()
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    send = functools.partial(send_alone, connection, threading.Lock())

    def beat() -> None:
        send(Beat(rank, newest_messages()))

    def answer() -> None:
        print_messages()
        beat()

    start_on(signal.SIGUSR1, answer)
    if options.heartbeat > 0:
        start_beating(beat, interval(options.heartbeat))
    else:
        beat()
    # tqdm, which torch imports if it is there, would share a semaphore between processes, and Python complains about it when a
    # rank is ended.
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("tqdm").tqdm.set_lock(threading.RLock())
    if sys.platform == "linux":
        # Local ranks meet on the loopback device; the host's own name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        with process_group(options, rank, options.ranks, rank, f"file://{store}") as device:
            loop.train(options, rank, device, send if rank == 0 else ignore, interrupt)
        send(Finished(rank))
    except BaseException as error:
        send(failed(rank, error))
        if is_timeout(str(error)):
            answer()
        # Threads of torch and Inductor may wait for ranks that are gone: leave without asking them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def send_alone(connection: Connection, lock: threading.Lock, event: Event) -> None:
    """Send an event; the threads of a rank take turns."""
    with lock:
        connection.send(event)


def exit_with_parent() -> None:
    """Leave when the launcher is gone, whatever ended it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def ignore(event: Event) -> None:
    """Drop an event: ranks other than 0 report failures only."""
