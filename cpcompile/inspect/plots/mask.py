"""Mask: which rank computes which part of an attention matrix, in several layouts side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpcompile.inspect.areas import Matrix
from cpcompile.inspect.colors import color_of
from cpcompile.inspect.plots.canvas import canvas

MOST_NUMBERED = 16  # ranks with their number at their queries
LEAST_NUMBERED = 1 / 18  # of the height, that a run must have for a number


def plot_masks(matrices: Sequence[Matrix], title: str, out: Path) -> None:
    """Draw each matrix above the work of its ranks."""
    count = len(matrices)
    with canvas(out, 2, count, (0.8 + 2.9 * count, 5.2)) as (figure, panels):
        works = [list(matrix.work.values()) for matrix in matrices]
        for column, (matrix, work) in enumerate(zip(matrices, works, strict=True)):
            draw_mask(panels[0, column], matrix)
            draw_work(panels[1, column], work, highest(works))
        panels[0, 0].set_ylabel("queries", labelpad=14)
        panels[1, 0].set_ylabel("work over the mean")
        figure.suptitle(title, fontsize=11)


def draw_mask(axes: Any, matrix: Matrix) -> None:
    """Draw the polygons of all ranks, queries down."""
    count = len(matrix.rows)
    for area in matrix.areas:
        xs, ys = zip(*area.corners, strict=True)
        axes.fill(xs, ys, color=color_of(area.rank, count), linewidth=0.3, gid=f"rank {area.rank}")
    if count <= MOST_NUMBERED:
        for rank, spans in matrix.rows.items():
            for span in spans:
                if span.size >= LEAST_NUMBERED * matrix.length:
                    middle = span.position + span.size / 2
                    axes.text(-0.015 * matrix.length, middle, str(rank), ha="right", va="center", fontsize=8)
    axes.set_xlim(0, matrix.length)
    axes.set_ylim(matrix.length, 0)
    axes.set_aspect("equal")
    axes.set_xticks([0, matrix.length])
    axes.set_yticks([])
    axes.set_facecolor("#eef0f2")
    axes.set_xlabel("keys", labelpad=-8)
    axes.set_title(matrix.title, fontsize=10)


def draw_work(axes: Any, work: Sequence[float], top: float) -> None:
    """Draw a bar for each rank: its work over the mean of all; the axis ends at `top`, so that panels can be compared."""
    shares = over_mean(work)
    axes.bar(range(len(work)), shares, color=[color_of(rank, len(work)) for rank in range(len(work))])
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, 1.1 * top)
    axes.set_xlabel("rank")
    axes.set_title(f"busiest: {max(shares):.2f} of the mean", fontsize=9)
    if len(work) <= MOST_NUMBERED:
        axes.set_xticks(range(len(work)))


def over_mean(work: Sequence[float]) -> list[float]:
    """Return the work of each rank over the mean of all."""
    mean = sum(work) / len(work) or 1.0
    return [each / mean for each in work]


def highest(works: Iterable[Sequence[float]]) -> float:
    """Return the most work over its mean of several."""
    return max(1.0, *(max(over_mean(work)) for work in works))
