"""Profile: where the time of a step went, out of the traces of torch's profiler that ranks wrote.

Each moment of a step is one of: attention computes; something else computes; only a transfer runs (it is exposed); nothing
runs, because the host has launched nothing or because what it launched waits. Work belongs to an attention if it was launched
inside of its range (`runtime.attention.profiling`), and to a layer likewise (`runtime.layer_ranges`).
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from cpcompile.errors import ConfigError
from cpcompile.inspect.spans import Span, Spans, clip, minus, total, union
from cpcompile.inspect.stream_times import StreamTime, Task, stream_times
from cpcompile.inspect.trace import ON_DEVICE, ON_HOST, RankTrace, kind_of, read_traces, span_of
from cpcompile.runtime.attention.profiling import AttentionRange
from cpcompile.runtime.layer_ranges import LayerRange

T = TypeVar("T")

ANNOTATIONS = "user_annotation"
STEP = re.compile(r"ProfilerStep#\d+")
# On a CPU: messages on their way, operators that compute nothing themselves, and graphs that Inductor compiled, whose own
# kernels are no operators.
MESSAGE = re.compile(r"gloo:")
CALLS = re.compile(r"cpcompile::|c10d::|record_param_comms")
ENGINE = "autograd::"  # around what backward runs, compiled graphs too
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
class LayerTime:
    """What a layer took in a step, its attention included, in seconds; fields as those of `AttentionTime`."""

    layer: str
    direction: str
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
        layers: each layer, in the order of its first range; none where the trace has no ranges of layers.
        streams: each stream of the device, by number; none on a CPU.
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
    layers: tuple[LayerTime, ...]
    streams: tuple[StreamTime, ...]
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What ran, the attention and the layer that it is a part of, and on a device its stream and the call that launched it, where
    that is known.
    """

    name: str
    span: Span
    is_transfer: bool
    within: AttentionRange | None
    layer: LayerRange | None
    stream: int | None = None
    launch: Span | None = None

    @property
    def launched(self) -> float | None:
        """When it was launched."""
        return None if self.launch is None else self.launch[0]


class Ranges(Generic[T]):
    """The ranges of a rank that are of one kind, by thread; those of a thread follow one another."""

    def __init__(self, events: Iterable[dict[str, Any]], kind: Callable[[str], T | None]) -> None:
        self.calls: list[T] = []
        self._found: dict[Any, list[tuple[Span, T]]] = {}
        for event in events:
            named = kind(event["name"]) if event.get("cat") == ANNOTATIONS else None
            if named is not None:
                self.calls.append(named)
                for thread in (event.get("tid"), None):
                    self._found.setdefault(thread, []).append((span_of(event), named))
        for found in self._found.values():
            found.sort(key=lambda each: each[0])

    def around(self, at: float, thread: Any = None) -> T | None:
        """Return the range of a thread, or of any, that is open at a time."""
        found = self._found.get(thread, [])
        index = bisect.bisect_right(found, at, key=lambda each: each[0][0]) - 1
        return found[index][1] if index >= 0 and at <= found[index][0][1] else None

    def divide(self, span: Span) -> Iterator[tuple[Span, T | None]]:
        """Yield what of a span is in each range of any thread, and what is in none."""
        at, end = span
        found = self._found.get(None, [])
        for (start, stop), named in found[max(0, bisect.bisect_right(found, at, key=lambda each: each[0][0]) - 1) :]:
            if start >= end:
                break
            if stop > at:
                yield from [((at, start), None)] if start > at else []
                yield (max(start, at), min(stop, end)), named
                at = min(stop, end)
        if at < end:
            yield (at, end), None


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
    ranges, layers = Ranges(trace.events, AttentionRange.of), Ranges(trace.events, LayerRange.of)
    if not ranges.calls:
        raise ConfigError(
            f"{trace.path} has no range of an attention, such as `cpcompile.ring zig_zag model.layers.3.self_attn`: trace steps "
            "of a model that cpcompile made parallel, with ProfilerActivity.CPU among the activities, behind its first call."
        )
    on_device = any(event.get("cat") in ON_DEVICE for event in trace.events)
    works = works_on_device(trace, ranges, layers) if on_device else works_on_host(trace, ranges, layers)
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
    of_ranges = grouped(works, ranges.calls, lambda work: work.within)
    of_layers = grouped(works, layers.calls, lambda work: work.layer)
    calls = Counter(ranges.calls)
    tasks = [Task(x.stream, x.span, x.launch, x.is_transfer) for x in works if x.stream is not None]
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
        attentions=tuple(
            AttentionTime(x.layer, x.strategy, x.layout, direction(x), calls[x] / count, *times(own, computing, count))
            for x, own in of_ranges.items()
        ),
        layers=tuple(LayerTime(x.layer, direction(x), *times(own, computing, count)) for x, own in of_layers.items()),
        streams=tuple(stream_times(tasks, window, count)),
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


def grouped(works: Iterable[Work], keys: Iterable[T], key: Callable[[Work], T | None]) -> dict[T, list[Work]]:
    """Return the works of each key, of none for one that has none."""
    found: dict[T, list[Work]] = {each: [] for each in keys}
    for work in works:
        named = key(work)
        if named is not None:
            found[named].append(work)
    return found


def direction(of: AttentionRange | LayerRange) -> str:
    """Return whether a range is of forward or of backward."""
    return "backward" if of.is_backward else "forward"


def times(own: Sequence[Work], computing: Spans, count: int) -> tuple[float, float, float]:
    """Return how long kernels, transfers and exposed transfers took in a step, of `count`; `computing` is when anything was."""
    transfers = union(work.span for work in own if work.is_transfer)
    kernels = union(work.span for work in own if not work.is_transfer)
    return total(kernels) / count, total(transfers) / count, total(minus(transfers, computing)) / count


def works_on_device(trace: RankTrace, ranges: Ranges[AttentionRange], layers: Ranges[LayerRange]) -> list[Work]:
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
            call = None if launch is None else span_of(launch)
            place = () if launch is None or call is None else (call[0], launch.get("tid"))
            works.append(
                Work(
                    event["name"],
                    span_of(event),
                    kind_of(event) == "transfer",
                    ranges.around(*place) if place else None,
                    layers.around(*place) if place else None,
                    event.get("args", {}).get("stream"),
                    call,
                )
            )
    return works


def works_on_host(trace: RankTrace, ranges: Ranges[AttentionRange], layers: Ranges[LayerRange]) -> list[Work]:
    """Return what ran on a CPU: what it is a part of is known by when it began."""
    works, calls, compiled = [], [], []
    for event in trace.events:
        name, span = event["name"], span_of(event)
        if MESSAGE.match(name):
            works.append(Work(name, span, True, ranges.around(span[0]), layers.around(span[0])))
        elif COMPILED.match(name):
            compiled.append(span)
        elif event.get("cat") == "cpu_op" and CALLS.match(name):
            calls.append(span)
        elif event.get("cat") == "cpu_op" and "::" in name and not name.startswith(ENGINE):
            place = span[0], event.get("tid")
            works.append(Work(name, span, False, ranges.around(*place), layers.around(*place)))
    generated = minus(union(compiled), union(calls))
    parts = (part for span in generated for part in layers.divide(span))
    return [*works, *(Work("compiled graphs", span, False, None, layer) for span, layer in parts)]


def window_of(trace: RankTrace, steps: Sequence[Span]) -> Span:
    """Return when the steps began, and when the last of their work ended; without steps, that of all that ran."""
    categories = ON_DEVICE if steps else (*ON_DEVICE, *ON_HOST, ANNOTATIONS)
    spans = [*steps, *(span_of(event) for event in trace.events if event.get("cat") in categories)]
    return min(start for start, _ in steps or spans), max(end for _, end in spans)


def to_dict(profiles: Sequence[RankProfile], against: Sequence[RankProfile] = ()) -> dict[str, Any]:
    """Return the profiles, and those that they are compared with, as plain data, times in seconds."""
    compared = {"against": [asdict(profile) for profile in against]} if against else {}
    return {"ranks": [asdict(profile) for profile in profiles]} | compared
