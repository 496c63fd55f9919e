"""Stream times: how long each stream of a device was busy in a step, and why it was idle the rest of the time.

A gap ends where the next work of the stream starts. What was launched when the gap began waited on the device; the rest of a gap
is the host's, up to the end of the call that launched.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cpcompile.inspect.spans import Span, clip, minus, total, union

SHORT = 5e-6  # seconds: what a device takes from one kernel to the next, from a launch to its start, or from an event to a start
# Fields of a stream, as people read them.
CAUSES = {
    "host": "nothing launched",
    "transfers": "for a transfer",
    "others": "for another stream",
    "short": "between kernels",
    "unknown": "unknown",
}


@dataclass(frozen=True, slots=True)
class StreamTime:
    """Where the time of a step of a stream went, in seconds: a step is the sum of all.

    Attributes:
        stream: its number.
        busy: while anything ran on it.
        host: idle, and what ran next was launched only then, or nothing was any more.
        transfers: idle, until a transfer of another stream ended.
        others: idle, until other work of another stream ended.
        short: idle for 5 microseconds or less, though what ran next was launched before.
        unknown: idle for longer, with nothing in the trace that it could have waited for: another GPU, for example.
    """

    stream: int
    busy: float
    host: float
    transfers: float
    others: float
    short: float
    unknown: float


class Task(NamedTuple):
    """What ran on a stream, and the call that launched it, where that is known."""

    stream: int
    span: Span
    launch: Span | None
    is_transfer: bool


def stream_times(tasks: Sequence[Task], window: Span, count: int) -> Iterator[StreamTime]:
    """Yield what each stream did in a step, of `count` in a window."""
    by_end = sorted(tasks, key=lambda task: task.span[1])
    for stream in sorted({task.stream for task in tasks}):
        own = sorted((task for task in tasks if task.stream == stream), key=lambda task: task.span)
        others = [task for task in by_end if task.stream != stream]
        busy = clip(union(task.span for task in own), window)
        idle = dict.fromkeys(CAUSES, 0.0)
        for gap in minus([window], busy):
            for cause, seconds in causes(gap, next_of(own, gap), others):
                idle[cause] += seconds
        yield StreamTime(stream, total(busy) / count, **{cause: seconds / count for cause, seconds in idle.items()})


def next_of(own: Sequence[Task], gap: Span) -> Task | None:
    """Return the work of a stream that ends a gap, None where nothing runs any more."""
    index = bisect.bisect_left(own, gap[1], key=lambda task: task.span[0])
    return own[index] if index < len(own) else None


def causes(gap: Span, task: Task | None, others: Sequence[Task]) -> Iterator[tuple[str, float]]:
    """Yield why a stream was idle, and how long; `others` ran on other streams, by their ends."""
    start, end = gap
    if task is None:
        yield "host", end - start
        return
    if task.launch is not None and task.launch[0] > start:
        launched = min(task.launch[1], end)
        until = end if end - launched <= SHORT else launched
        yield "host", until - start
        start = until
    if start < end:
        yield waited_for((start, end), others), end - start


def waited_for(gap: Span, others: Sequence[Task]) -> str:
    """Return what launched work waited for in a gap: the last that ended on another stream, if that was just before its start."""
    if gap[1] - gap[0] <= SHORT:
        return "short"
    index = bisect.bisect_right(others, gap[1], key=lambda task: task.span[1]) - 1
    if index < 0 or others[index].span[1] <= max(gap[0], gap[1] - SHORT):
        return "unknown"
    return "transfers" if others[index].is_transfer else "others"
