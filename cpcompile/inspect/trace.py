"""Trace: what torch's profiler wrote as lanes, a line for each stream of a rank and for its host."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError
from cpcompile.inspect.plots.canvas import canvas

# The first that a name fits is its kind.
KINDS = {
    "attention": re.compile(r"attention|attn|fmha|flash|sdpa|flex", re.IGNORECASE),
    "transfer": re.compile(
        r"nccl|gloo|c10d|memcpy|copy_|send|recv|all_?reduce|all_?gather|all_?to_?all|put|fetch", re.I
    ),
    "other": re.compile(""),
}
COLORS = {"attention": "#4e79a7", "transfer": "#f28e2b", "other": "#b8bfc7"}
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
ON_HOST = ("cpu_op", "cuda_runtime", "cuda_driver")


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


def read_lanes(paths: Sequence[Path]) -> list[TraceLane]:
    """Return the lanes of the traces of some ranks; a trace without a rank has the number of its file.

    Raises:
        ConfigError: a file is no trace of torch's profiler, or nothing ran in it.
    """
    lanes: list[TraceLane] = []
    first = 0
    for number, path in enumerate(paths):
        trace = load(path)
        base = int(trace.get("baseTimeNanoseconds", 0))  # of a trace's times; ranks of one host have one clock
        first = first or base
        rank = int((trace.get("distributedInfo") or {}).get("rank", number))
        lanes += lanes_of(rank, trace["traceEvents"], (base - first) / 1e9)
    if not lanes:
        raise ConfigError(f"nothing ran in {', '.join(map(str, paths))}: neither operators nor kernels.")
    return sorted(lanes, key=lambda lane: lane.rank)


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


def lanes_of(rank: int, events: Iterable[dict[str, Any]], offset: float = 0.0) -> list[TraceLane]:
    """Return the lanes of one rank, its host last; `offset`: seconds by which its clock began later."""
    found: dict[str, list[Event]] = {}
    for event in events:
        category = event.get("cat")
        if event.get("ph") != "X" or category not in (*ON_DEVICE, *ON_HOST):
            continue
        lane = f"stream {event['args']['stream']}" if category in ON_DEVICE else "host"
        start, length = offset + float(event["ts"]) / 1e6, float(event.get("dur", 0)) / 1e6
        found.setdefault(lane, []).append(Event(kind_of(event["name"], category), start, start + length))
    order = sorted(found, key=lambda name: (name == "host", len(name), name))
    return [TraceLane(rank, name, tuple(sorted(found[name], key=lambda e: (e.start, -e.end)))) for name in order]


def kind_of(name: str, category: str) -> str:
    """Return what kind of work an event is."""
    if category == "gpu_memcpy":
        return "transfer"
    return next(kind for kind, wanted in KINDS.items() if wanted.search(name))


def plot_trace(lanes: Sequence[TraceLane], title: str, out: Path) -> None:
    """Draw a line for each lane, kinds in colours."""
    first = min(lane.events[0].start for lane in lanes)
    with canvas(out, 1, 1, (12, 1.4 + 0.42 * len(lanes))) as (figure, panels):
        axes = panels[0, 0]
        for line, lane in enumerate(lanes):
            # What is nested in another operator is drawn over it.
            for kind in reversed(KINDS):
                bars = [((e.start - first) * 1e3, (e.end - e.start) * 1e3) for e in lane.events if e.kind == kind]
                axes.broken_barh(bars, (line - 0.38, 0.76), facecolor=COLORS[kind], linewidth=0)
        axes.set_yticks(range(len(lanes)), [f"rank {lane.rank}, {lane.name}" for lane in lanes], fontsize=8)
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.set_xlabel("ms")
        for kind, color in COLORS.items():
            axes.barh(0, 0, color=color, label=kind)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        axes.set_title(title, fontsize=11)
