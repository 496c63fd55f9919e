"""Messages: what the record of this process holds, for people who look at a job that is stuck, and which rank is behind."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any

import torch.distributed as dist

from cpcompile import _torch
from cpcompile.errors import TORCH, ConfigError
from cpcompile.inspect.text import duration, size, table
from cpcompile.runtime import record

HEAD = ("number", "operator", "layer", "direction", "first operand", "group", "started", "state")
SHOWN, TOLD = 12, 8  # messages that are printed, and that ranks tell each other


@dataclass(frozen=True, slots=True)
class Message:
    """An operator that sent messages, or is about to.

    Attributes:
        number: how many of its group there were before it, and 1. All ranks of the group count alike.
        operator: its name: `ring_attention`, `gather_tokens`; `sum_gradients` for a bucket of gradients, `compare_ranks` for what
            the ranks compare before they compute.
        layer: the module of an attention, as in profiles; '' for others.
        is_backward: it runs in a backward; what a checkpoint computes again does too.
        ranks: the ranks of its process group.
        num_bytes: of its first operand; 0 where that is not known.
        seconds: how long ago it was started.
        state: `running` while the host is in it, `failed` where it raised. Then `done` on a CPU, and on a GPU `launched`: the
            host goes on, and the GPU has not ended it, or is not known to have: what is captured in a CUDA graph.
    """

    number: int
    operator: str
    layer: str
    is_backward: bool
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float
    state: str

    def __str__(self) -> str:
        of = f" of {self.layer}" if self.layer else ""
        return f"{self.operator}{of}{' in backward' if self.is_backward else ''} ({self.state})"


@dataclass(frozen=True, slots=True)
class Collective:
    """A collective of NCCL or gloo that has not ended.

    Attributes:
        number: how many of its group there were before it, and 1. All ranks of the group count alike.
        operator: what torch calls it: `nccl:all_gather`.
        purpose: the description of its process group.
        ranks: of that group.
        seconds: how long ago it was started.
        has_begun: its kernel runs on the GPU.
        group: the name of that group, which tells it from others of the same ranks and description.
    """

    number: int
    operator: str
    purpose: str
    ranks: tuple[int, ...]
    seconds: float
    has_begun: bool
    group: str = ""

    def __str__(self) -> str:
        begun = ", begun" if self.has_begun else ""
        return f"{self.operator} {self.number} of {self.purpose or 'a group'} ({_named(self.ranks)}{begun})"


@dataclass(frozen=True, slots=True)
class Messages:
    """The last messages of one rank, oldest first. Print it for a table.

    Attributes:
        rank: this rank, in the default process group.
        messages: the last messages.
        counts: how often each operator has run since the process began, by (operator, layer, whether in a backward).
        collectives: of NCCL and gloo that have not ended, whoever began them: FSDP, DDP, an optimizer, your own code.
    """

    rank: int
    messages: tuple[Message, ...]
    counts: Mapping[tuple[str, str, bool], int]
    collectives: tuple[Collective, ...] = ()

    def __iter__(self) -> Iterator[Message]:
        return iter(self.messages)

    def __len__(self) -> int:
        return len(self.messages)

    def __getitem__(self, index: int) -> Message:
        return self.messages[index]

    def __str__(self) -> str:
        others = [f"  not ended: {each}, {duration(each.seconds)} ago" for each in self.collectives]
        if not self.messages:
            return "\n".join([f"rank {self.rank}: no message was sent", *others])
        rows = [
            (
                each.number,
                each.operator,
                each.layer or "-",
                "backward" if each.is_backward else "forward",
                size(each.num_bytes) if each.num_bytes else "-",
                _named(each.ranks),
                f"{duration(each.seconds)} ago",
                each.state,
            )
            for each in self
        ]
        return "\n".join([f"rank {self.rank}: the last messages", *table(HEAD, rows), *others])


def _named(ranks: Sequence[int]) -> str:
    if not ranks:
        return "destroyed"
    return f"ranks {','.join(map(str, ranks))}" if len(ranks) <= 8 else f"{len(ranks)} ranks"


def last_messages(count: int = record.SIZE) -> Messages:
    """Return the last operators of this process that send messages, whatever carries these: NCCL, symmetric memory or gloo.

        print(cpcompile.last_messages(8))

        rank 1: the last messages
          number  operator       layer                     direction  first operand  group      started     state
          ...
          1203    all_reduce     -                         forward    8 B            ranks 0,1  12.2 s ago  done
          1204    ring_attention model.layers.3.self_attn  forward    4 MiB          ranks 0,1  12.1 s ago  running

    Ranks of a group count alike, so that the one with the smaller number is behind. A process keeps the last 256. Every call of
    an operator of cpcompile is there, sums of gradients and the comparison of the ranks too; what a CUDA graph replays is not.
    Of what FSDP, DDP, an optimizer or your own code sends, `collectives` has those that have not ended (torch's flight recorder,
    which is on unless `TORCH_FR_BUFFER_SIZE=0`). It may be called from any thread while another one waits.

    Args:
        count: how many, the newest of those that are kept.

    Returns:
        The messages, oldest first: a sequence of `number`, `operator`, `layer`, `is_backward`, `ranks`, `num_bytes`, `seconds`
        (how long ago it was started) and `state` (`running`, `launched`, `done`, `failed`). `counts` says how often each operator
        has run since the process began, by (operator, layer, whether in a backward).

    Raises:
        ConfigError: `count` is no number of messages.
    """
    if count < 1:
        raise ConfigError(f"count={count} is no number of messages: give 1 at least.")
    now, found = monotonic(), record.entries()
    ranks = {group: _ranks_of(group) for group in {each.group for each in found}}
    messages = [
        Message(
            each.number,
            each.operator,
            each.layer,
            each.backward != -1,
            ranks[each.group],
            each.num_bytes,
            max(0.0, now - each.start),
            _state(each),
        )
        for each in found[max(0, len(found) - count) :]
    ]
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Messages(rank, tuple(messages), record.counts(), _collectives())


def newest_messages() -> Messages:
    """Return the few messages that ranks tell each other."""
    return replace(last_messages(TOLD), counts={})


def _state(entry: record.Entry) -> str:
    if entry.state != record.RETURNED:
        return entry.state
    if entry.gpu == -1:
        return "done"
    try:
        return "done" if entry.event is not None and entry.event.query() else "launched"  # type: ignore[no-untyped-call]
    except RuntimeError:  # the GPU has failed
        return "launched"


def _collectives() -> tuple[Collective, ...]:
    """Return those of groups that are still there: torch keeps what a group that was destroyed had not ended."""
    found = [(each, _ranks_of(each.group)) for each in _torch.unfinished_collectives()]
    return tuple(
        Collective(each.number, each.operator, each.purpose, ranks, each.seconds, each.has_begun, each.group)
        for each, ranks in found
        if ranks
    )


def _ranks_of(group: str) -> tuple[int, ...]:
    """Return the ranks of a group; none where it is no more."""
    try:
        return tuple(dist.get_process_group_ranks(_torch.resolve_group(group)))
    except (RuntimeError, ValueError, KeyError):
        return ()


def print_messages_on(number: int = signal.SIGUSR1) -> None:
    """Print `last_messages` to stderr, and where the main thread is, whenever this process gets a signal.

        cpcompile.print_messages_on(signal.SIGUSR1)      # then: kill -USR1 PROCESS

    A thread prints, so that it works while the main thread waits in a collective, where a handler of Python's would wait too.

    Args:
        number: the signal.

    Raises:
        ConfigError: this is not the main thread, which alone may choose what a signal does, or no signal that can be caught.
    """
    start_on(number, print_messages)


_acts: dict[int, Callable[[], None]] = {}  # what is done on which signal


def start_on(number: int, act: Callable[[], None]) -> None:
    """Call `act` in a thread whenever this process gets a signal."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError("only the main thread can choose what a signal does: call print_messages_on there.")
    try:
        known = signal.getsignal(number) is _nothing and _acts.get(number) == act
        signal.signal(number, _nothing)  # without a handler of Python's, nothing is written to the pipe
    except (TypeError, ValueError, OSError) as error:
        raise ConfigError(f"{number!r} is no signal that can be caught: give signal.SIGUSR1, for example.") from error
    if known:  # a second thread would act a second time
        return
    _acts[number] = act
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def run() -> None:
        while told := os.read(reader, 1):
            if before != -1:  # an event loop had asked for signals before
                with contextlib.suppress(OSError):
                    os.write(before, told)
            if told[0] == number:
                act()

    threading.Thread(target=run, name=f"on signal {number}", daemon=True).start()


def _nothing(number: int, frame: Any) -> None:
    pass


def print_messages() -> None:
    """Print the last messages of this rank to stderr, and where its main thread is."""
    frames = traceback.extract_stack(sys._current_frames().get(threading.main_thread().ident or 0))
    own = [each for each in frames if not each.filename.startswith((TORCH, "<"))]
    place = f"its main thread is in {own[-1].filename}:{own[-1].lineno}, {own[-1].name}" if own else ""
    print(f"{last_messages(SHOWN)}\n  {place}", file=sys.stderr, flush=True)
