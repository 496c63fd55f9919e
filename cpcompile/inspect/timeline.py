"""Timeline: what ran in the traces of some ranks as tracks, each of which is a row of an interactive picture.

A stream of a device is a track, so are the layers of a rank, and each depth of nested operators of each thread of its host:
what a track holds follows one another, so that what is in view is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cpcompile.errors import ConfigError
from cpcompile.inspect.profile import Ranges, works_on_device
from cpcompile.inspect.trace import KINDS, ON_HOST, RankTrace, kind_of, read_traces, span_of
from cpcompile.runtime.attention.profiling import AttentionRange
from cpcompile.runtime.layer_ranges import LayerRange

DEPTH = 8  # nested operators that are drawn; what is deeper is within one of these


class Bar(NamedTuple):
    """Something that ran: when, in seconds, what it is a part of, and how long after its launch it started (None: unknown)."""

    start: float
    end: float
    name: str
    kind: str
    layer: str
    delay: float | None = None


@dataclass(frozen=True, slots=True)
class Track:
    """Bars that follow one another. `title` says of what, and is '' for the next depth of the same thread."""

    title: str
    bars: list[Bar] = field(default_factory=list)


def read_tracks(paths: Sequence[Path]) -> list[Track]:
    """Return the tracks of the traces of some ranks.

    Raises:
        ConfigError: a file is no trace of torch's profiler, or nothing ran in it.
    """
    tracks = [track for trace in read_traces(paths) for track in tracks_of(trace)]
    if not tracks:
        raise ConfigError(f"nothing ran in {', '.join(map(str, paths))}: neither operators nor kernels.")
    return tracks


def tracks_of(trace: RankTrace) -> list[Track]:
    """Return the tracks of one rank: its streams, its layers, its threads."""
    attentions, layers = Ranges(trace.events, AttentionRange.of), Ranges(trace.events, LayerRange.of)
    streams: dict[int, list[Bar]] = {}
    for work in works_on_device(trace, attentions, layers):
        start, end = work.span
        is_attention = work.within is not None or KINDS["attention"].search(work.name)
        kind = "transfer" if work.is_transfer else "attention" if is_attention else "other"
        delay = None if work.launched is None else start - work.launched
        bar = Bar(start, end, work.name, kind, part_of(work.within, work.layer), delay)
        streams.setdefault(work.stream if work.stream is not None else -1, []).append(bar)
    threads: dict[Any, list[Bar]] = {}
    of_layers: dict[Any, list[Bar]] = {}
    for event in trace.events:
        start, end = span_of(event)
        named = LayerRange.of(event["name"])
        if event.get("cat") == "user_annotation" and named is not None:
            of_layers.setdefault(event.get("tid"), []).append(Bar(start, end, direction(named), "layer", ""))
        elif event.get("cat") in ON_HOST:
            place = start, event.get("tid")
            part = part_of(attentions.around(*place), layers.around(*place))
            threads.setdefault(event.get("tid"), []).append(Bar(start, end, event["name"], kind_of(event), part))
    rank = f"rank {trace.rank}"
    found = [Track(f"{rank}, stream {stream}", streams[stream]) for stream in sorted(streams)]
    found += [Track(f"{rank}, layers as the host launches them", bars) for bars in of_layers.values()]
    for thread, bars in threads.items():
        name = f"{rank}, host" + (f" thread {thread}" if len(threads) > 1 else "")
        found += [Track(name if depth == 0 else "", row) for depth, row in enumerate(by_depth(bars)[:DEPTH])]
    return [Track(track.title, in_order(track.bars, trace.offset)) for track in found]


def part_of(attention: AttentionRange | None, layer: LayerRange | None) -> str:
    """Return what something is a part of, for people."""
    if attention is not None:
        return f"{attention.strategy} {attention.layout} {direction(attention)}"
    return direction(layer) if layer is not None else ""


def direction(of: AttentionRange | LayerRange) -> str:
    """Return the layer of a range, and that it is of backward."""
    return f"{of.layer} backward" if of.is_backward else of.layer


def by_depth(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Return bars of one thread, by how many others they are inside of."""
    rows: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: (bar.start, -bar.end)):
        row = next((row for row in rows if row[-1].end <= bar.start), None)
        if row is None:
            rows.append(row := [])
        row.append(bar)
    return rows


def in_order(bars: Iterable[Bar], offset: float) -> list[Bar]:
    """Return bars in the order of time, on the clock of the first rank."""
    return [bar._replace(start=bar.start + offset, end=bar.end + offset) for bar in sorted(bars)]


def to_data(tracks: Sequence[Track]) -> dict[str, Any]:
    """Return tracks as plain data: each text once, times in microseconds since the first."""
    first = min(track.bars[0].start for track in tracks)
    last = max(bar.end for track in tracks for bar in track.bars)
    texts: dict[str, int] = {}

    def number(text: str) -> int:
        return texts.setdefault(text, len(texts))

    rows = [
        {
            "title": track.title,
            "start": [microseconds(bar.start - first) for bar in track.bars],
            "length": [microseconds(bar.end - bar.start) for bar in track.bars],
            "name": [number(bar.name) for bar in track.bars],
            "kind": [number(bar.kind) for bar in track.bars],
            "layer": [number(bar.layer) for bar in track.bars],
            "delay": [None if bar.delay is None else microseconds(bar.delay) for bar in track.bars],
        }
        for track in tracks
    ]
    return {"texts": list(texts), "end": microseconds(last - first), "tracks": rows}


def microseconds(seconds: float) -> float:
    """Return microseconds, to the nanosecond."""
    return round(seconds * 1e6, 3)
