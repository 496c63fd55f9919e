"""Profile: where the time of a step went, out of the traces of torch's profiler that ranks wrote.

Each moment of a step is one of: attention computes; something else computes; only a transfer runs (it is exposed); nothing
runs, because the host has launched nothing or because what it launched waits. Work belongs to an attention if it was launched
inside of its range (`runtime.attention.profiling`).
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError
from cpcompile.inspect.trace import ON_DEVICE, ON_HOST, RankTrace, kind_of, read_traces, span_of
from cpcompile.runtime.attention.profiling import AttentionRange

Span = tuple[float, float]
Spans = list[Span]

ANNOTATIONS = "user_annotation"
STEP = re.compile(r"ProfilerStep#\d+")
# On a CPU: messages on their way, operators that compute nothing themselves, and graphs that Inductor compiled, whose own
# kernels are no operators.
MESSAGE = re.compile(r"gloo:")
CALLS = re.compile(r"cpcompile::|c10d::|autograd::|record_param_comms")
COMPILED = re.compile(r".*CompiledFxGraph")
# Fields of a profile that are a step and its parts, as people read them.
PARTS = {
    "step": "a step",
    "attention": "attention",
    "other": "other kernels",
    "exposed": "exposed transfers",
    "host_gaps": "host gaps",
    "device_gaps": "device gaps",
}


@dataclass(frozen=True, slots=True)
class AttentionTime:
    """What the attention of one range took in a step, in seconds.

    Attributes:
        layer, strategy, layout: as in the range.
        direction: `forward` or `backward`.
        calls: how often it ran.
        kernels: while its kernels ran.
        transfers: while its transfers ran.
        exposed: of these, while nothing was computed.
    """

    layer: str
    strategy: str
    layout: str
    direction: str
    calls: float
    kernels: float
    transfers: float
    exposed: float


@dataclass(frozen=True, slots=True)
class KernelTime:
    """How often a kernel ran in a step (on a CPU: an operator, with those that it calls), and for how many seconds."""

    name: str
    calls: float
    seconds: float


@dataclass(frozen=True, slots=True)
class RankProfile:
    """Where the time of a step of a rank went, in seconds: `step` is the sum of the next five.

    Attributes:
        rank: its number.
        device: `cuda` or `cpu`.
        num_steps: how many steps were traced; all else is of the mean of them.
        step: all.
        attention: while attention was computed.
        other: while only other kernels ran.
        exposed: while only transfers ran, of attention or of others.
        host_gaps: while nothing ran, and what ran next was launched only then: the host was late.
        device_gaps: while nothing ran, though what ran next had been launched before: it waited on the device.
        overlapped: how long transfers ran beside what was computed.
        attentions: each range.
        kernels: each kernel by its name, transfers too, the longest first.
    """

    rank: int
    device: str
    num_steps: int
    step: float
    attention: float
    other: float
    exposed: float
    host_gaps: float
    device_gaps: float
    overlapped: float
    attentions: tuple[AttentionTime, ...]
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What ran, the attention that it is a part of, and when it was launched, where that is known."""

    name: str
    span: Span
    is_transfer: bool
    within: AttentionRange | None
    launched: float | None = None


class Ranges:
    """The ranges of attention of a rank, by thread."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        self.calls: list[AttentionRange] = []
        self._found: dict[Any, list[tuple[Span, AttentionRange]]] = {}
        for event in events:
            attention = AttentionRange.of(event["name"]) if event.get("cat") == ANNOTATIONS else None
            if attention is not None:
                self.calls.append(attention)
                for thread in (event.get("tid"), None):
                    self._found.setdefault(thread, []).append((span_of(event), attention))
        for found in self._found.values():
            found.sort(key=lambda each: each[0])

    def around(self, at: float, thread: Any = None) -> AttentionRange | None:
        """Return the range of a thread, or of any, that is open at a time."""
        found = self._found.get(thread, [])
        index = bisect.bisect_right(found, at, key=lambda each: each[0][0]) - 1
        return found[index][1] if index >= 0 and at <= found[index][0][1] else None


def read_profile(paths: Sequence[Path]) -> list[RankProfile]:
    """Return where the time of each rank went.

    Raises:
        ConfigError: a file is no trace of torch's profiler, or no attention of cpcompile runs in it.
    """
    return [profile_of(trace) for trace in read_traces(paths)]


def profile_of(trace: RankTrace) -> RankProfile:
    """Return where the time of a rank went.

    Raises:
        ConfigError: no attention of cpcompile runs in the trace.
    """
    ranges = Ranges(trace.events)
    if not ranges.calls:
        raise ConfigError(
            f"{trace.path} has no range of an attention, such as `cpcompile.ring zig_zag model.layers.3.self_attn`: trace steps "
            "of a model that cpcompile made parallel, with ProfilerActivity.CPU among the activities, behind its first call."
        )
    on_device = any(event.get("cat") in ON_DEVICE for event in trace.events)
    works = works_on_device(trace, ranges) if on_device else works_on_host(trace, ranges)
    steps = [span_of(e) for e in trace.events if e.get("cat") == ANNOTATIONS and STEP.fullmatch(e["name"])]
    count = len(steps) or 1
    window = window_of(trace, steps)
    computing = union(work.span for work in works if not work.is_transfer)
    attention = union(work.span for work in works if work.within and not work.is_transfer)
    transfers = union(work.span for work in works if work.is_transfer)
    parts = [attention, minus(computing, attention), minus(transfers, computing)]
    inside = [total(clip(part, window)) / count for part in parts]
    step = (window[1] - window[0]) / count
    device_gaps = total(waits_on_device(works, window)) / count
    of_ranges: dict[AttentionRange, list[Work]] = {each: [] for each in ranges.calls}
    for work in works:
        if work.within is not None:
            of_ranges[work.within].append(work)
    calls = Counter(ranges.calls)
    return RankProfile(
        rank=trace.rank,
        device="cuda" if on_device else "cpu",
        num_steps=count,
        step=step,
        attention=inside[0],
        other=inside[1],
        exposed=inside[2],
        host_gaps=step - sum(inside) - device_gaps,
        device_gaps=device_gaps,
        overlapped=total(clip(transfers, window)) / count - inside[2],
        attentions=tuple(time_of(each, calls[each] / count, own, computing, count) for each, own in of_ranges.items()),
        kernels=kernel_times(works, window, count),
    )


def waits_on_device(works: Sequence[Work], window: Span) -> Spans:
    """Return when nothing ran although what ran next had been launched: before the device had nothing left to do."""
    ordered = sorted(works, key=lambda work: work.span)
    found = []
    for start, end in minus([window], union(work.span for work in works)):
        index = bisect.bisect_left(ordered, end, key=lambda work: work.span[0])
        launched = ordered[index].launched if index < len(ordered) else None
        if launched is not None and launched < start:
            found.append((start, end))
    return found


def kernel_times(works: Sequence[Work], window: Span, count: int) -> tuple[KernelTime, ...]:
    """Return what each kernel took in a step, of `count` in a window."""
    spans: dict[str, Spans] = {}
    for work in works:
        spans.setdefault(work.name, []).extend(clip([work.span], window))
    times = [KernelTime(name, len(own) / count, total(union(own)) / count) for name, own in spans.items()]
    return tuple(sorted((each for each in times if each.calls), key=lambda each: -each.seconds))


def time_of(
    attention: AttentionRange, calls: float, own: Sequence[Work], computing: Spans, count: int
) -> AttentionTime:
    """Return what an attention took in a step, of `count`: its own work, and when anything was computed."""
    transfers = union(work.span for work in own if work.is_transfer)
    return AttentionTime(
        attention.layer,
        attention.strategy,
        attention.layout,
        "backward" if attention.is_backward else "forward",
        calls,
        total(union(work.span for work in own if not work.is_transfer)) / count,
        total(transfers) / count,
        total(minus(transfers, computing)) / count,
    )


def works_on_device(trace: RankTrace, ranges: Ranges) -> list[Work]:
    """Return what ran on a device: what it is a part of is known by what launched it."""
    launches = {}
    for event in trace.events:
        number = event.get("args", {}).get("correlation")
        if event.get("cat") in ON_HOST and number is not None:
            launches[number] = event
    works = []
    for event in trace.events:
        if event.get("cat") in ON_DEVICE:
            launch = launches.get(event.get("args", {}).get("correlation"))
            launched = None if launch is None else span_of(launch)[0]
            within = None if launch is None else ranges.around(span_of(launch)[0], launch.get("tid"))
            works.append(Work(event["name"], span_of(event), kind_of(event) == "transfer", within, launched))
    return works


def works_on_host(trace: RankTrace, ranges: Ranges) -> list[Work]:
    """Return what ran on a CPU: what it is a part of is known by when it began."""
    works, calls, compiled = [], [], []
    for event in trace.events:
        name, span = event["name"], span_of(event)
        if MESSAGE.match(name):
            works.append(Work(name, span, True, ranges.around(span[0])))
        elif COMPILED.match(name):
            compiled.append(span)
        elif event.get("cat") == "cpu_op" and CALLS.match(name):
            calls.append(span)
        elif event.get("cat") == "cpu_op" and "::" in name:
            works.append(Work(name, span, False, ranges.around(span[0], event.get("tid"))))
    return [*works, *(Work("compiled graphs", span, False, None) for span in minus(union(compiled), union(calls)))]


def window_of(trace: RankTrace, steps: Sequence[Span]) -> Span:
    """Return when the steps began, and when the last of their work ended; without steps, that of all that ran."""
    categories = ON_DEVICE if steps else (*ON_DEVICE, *ON_HOST, ANNOTATIONS)
    spans = [*steps, *(span_of(event) for event in trace.events if event.get("cat") in categories)]
    return min(start for start, _ in steps or spans), max(end for _, end in spans)


def union(spans: Iterable[Span]) -> Spans:
    """Return spans in order, those that overlap as one."""
    joined: Spans = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def minus(spans: Spans, others: Spans) -> Spans:
    """Return what of `spans` is in none of `others`; both are unions."""
    left, first = [], 0
    for start, end in spans:
        while first < len(others) and others[first][1] <= start:
            first += 1
        at, number = start, first
        while number < len(others) and others[number][0] < end:
            left.append((at, others[number][0]))
            at, number = others[number][1], number + 1
        left.append((at, end))
    return [(start, end) for start, end in left if start < end]


def clip(spans: Spans, window: Span) -> Spans:
    """Return what of `spans` is in a window."""
    return [
        (max(start, window[0]), min(end, window[1])) for start, end in spans if end > window[0] and start < window[1]
    ]


def total(spans: Iterable[Span]) -> float:
    """Return how long spans are together."""
    return sum(end - start for start, end in spans)


def to_dict(profiles: Sequence[RankProfile], against: Sequence[RankProfile] = ()) -> dict[str, Any]:
    """Return the profiles, and those that they are compared with, as plain data, times in seconds."""
    compared = {"against": [asdict(profile) for profile in against]} if against else {}
    return {"ranks": [asdict(profile) for profile in profiles]} | compared
