"""Trace: what torch's profiler wrote as a picture, a line for each stream of a rank and for its host."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpcompile.inspect.plots.canvas import canvas
from cpcompile.inspect.trace import KINDS, TraceLane

COLORS = {"attention": "#4e79a7", "transfer": "#f28e2b", "other": "#b8bfc7"}


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
