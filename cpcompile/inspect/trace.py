"""Trace: what torch's profiler wrote of each rank, and the same as lanes, one for each stream of its device and for its host."""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError

# The first that the name of an operator fits is its kind.
KINDS = {
    "attention": re.compile(r"attention|attn|fmha|flash|sdpa|flex", re.IGNORECASE),
    "transfer": re.compile(
        r"nccl|gloo|c10d|memcpy|copy_|send|recv|all_?reduce|all_?gather|all_?to_?all|put|fetch", re.I
    ),
    "other": re.compile(""),
}
# Of what runs on a device, what goes over links; copies within its memory do not.
LINKS = re.compile(r"nccl|nvshmem|symm_?mem|barrier|multimem|PtoP|HtoD|DtoH", re.IGNORECASE)
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")


@dataclass(frozen=True, slots=True)
class RankTrace:
    """The trace of a rank: `events` are those that last, as the profiler wrote them. `offset`: seconds by which its clock began
    later than that of the first.
    """

    path: Path
    rank: int
    offset: float
    events: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that ran, and when, in seconds."""

    kind: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class TraceLane:
    """What ran one after the other: a stream of a rank's device, or its host."""

    rank: int
    name: str
    events: tuple[Event, ...]


def read_traces(paths: Sequence[Path]) -> list[RankTrace]:
    """Return the traces of some ranks, in their order; one without a rank has the number of its file.

    Raises:
        ConfigError: a file is no trace of torch's profiler.
    """
    traces, first = [], 0
    for number, path in enumerate(paths):
        trace = load(path)
        base = int(trace.get("baseTimeNanoseconds", 0))  # of a trace's times; ranks of one host have one clock
        first = first or base
        rank = int((trace.get("distributedInfo") or {}).get("rank", number))
        events = tuple(checked(event, path) for event in trace["traceEvents"] if is_lasting(event))
        traces.append(RankTrace(path, rank, (base - first) / 1e9, events))
    return sorted(traces, key=lambda trace: trace.rank)


def read_lanes(paths: Sequence[Path]) -> list[TraceLane]:
    """Return the lanes of the traces of some ranks.

    Raises:
        ConfigError: a file is no trace of torch's profiler, or nothing ran in it.
    """
    lanes = [lane for trace in read_traces(paths) for lane in lanes_of(trace)]
    if not lanes:
        raise ConfigError(f"nothing ran in {', '.join(map(str, paths))}: neither operators nor kernels.")
    return lanes


def load(path: Path) -> dict[str, Any]:
    """Return the trace in a `.json` or `.json.gz`."""
    try:
        raw = path.read_bytes()
        trace = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a trace: {error}") from error
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        raise ConfigError(f"{path} has no traceEvents: pass what torch.profiler's export_chrome_trace wrote.")
    return trace


def is_lasting(event: Any) -> bool:
    """Tell whether an entry of a trace is something that lasts; others are marks, names and arrows."""
    return isinstance(event, dict) and event.get("ph") == "X"


def checked(event: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return an event of which name, start and length are known.

    Raises:
        ConfigError: it has no such thing, as of a trace that another program wrote.
    """
    try:
        is_whole = isinstance(event["name"], str) and all(map(math.isfinite, span_of(event)))
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise ConfigError(
            f"{path} has an event without a name, or without a time: {str(event)[:200]}. Pass what torch.profiler's "
            "export_chrome_trace wrote."
        )
    return event


def lanes_of(trace: RankTrace) -> list[TraceLane]:
    """Return the lanes of one rank, its host last."""
    found: dict[str, list[Event]] = {}
    for event in trace.events:
        category = event.get("cat")
        if category not in (*ON_DEVICE, *ON_HOST):
            continue
        lane = f"stream {event.get('args', {}).get('stream', '?')}" if category in ON_DEVICE else "host"
        start, end = span_of(event)
        found.setdefault(lane, []).append(Event(kind_of(event), trace.offset + start, trace.offset + end))
    order = sorted(found, key=lambda name: (name == "host", len(name), name))
    return [TraceLane(trace.rank, name, tuple(sorted(found[name], key=lambda e: (e.start, -e.end)))) for name in order]


def span_of(event: dict[str, Any]) -> tuple[float, float]:
    """Return when an event began and ended, in seconds."""
    start = float(event["ts"]) / 1e6
    return start, start + float(event.get("dur", 0)) / 1e6


def kind_of(event: dict[str, Any]) -> str:
    """Return what kind of work an event is, by its name."""
    name = event["name"]
    if event["cat"] in ON_DEVICE:
        is_attention = KINDS["attention"].search(name)
        return "transfer" if LINKS.search(name) else "attention" if is_attention else "other"
    return next(kind for kind, wanted in KINDS.items() if wanted.search(name))
