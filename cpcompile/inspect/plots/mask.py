"""Mask: which rank computes which part of an attention matrix, in several layouts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpcompile.inspect.areas import Matrix
from cpcompile.inspect.colors import color_of
from cpcompile.inspect.plots.canvas import canvas

MOST_NUMBERED = 16  # ranks with their number at their queries


def plot_masks(matrices: Sequence[Matrix], title: str, out: Path) -> None:
    """Draw each matrix above the work of its ranks."""
    count = len(matrices)
    with canvas(out, 2, count, (0.6 + 3.3 * count, 5.4)) as (figure, panels):
        for column, matrix in enumerate(matrices):
            draw_mask(panels[0, column], matrix)
            draw_work(panels[1, column], list(matrix.work.values()))
        panels[0, 0].set_ylabel("queries")
        panels[1, 0].set_ylabel("work over the mean")
        figure.suptitle(title, fontsize=11)
        figure.get_layout_engine().set(h_pad=0.06)


def draw_mask(axes: Any, matrix: Matrix) -> None:
    """Draw the polygons of all ranks, queries down."""
    count = len(matrix.rows)
    for area in matrix.areas:
        xs, ys = zip(*area.corners, strict=True)
        axes.fill(xs, ys, color=color_of(area.rank, count), linewidth=0, gid=f"rank {area.rank}")
    if count <= MOST_NUMBERED:
        for rank, spans in matrix.rows.items():
            for span in spans:
                if span.size * MOST_NUMBERED * 2 >= matrix.length:
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


def draw_work(axes: Any, work: Sequence[float]) -> None:
    """Draw a bar for each rank: its work over the mean of all."""
    mean = sum(work) / len(work) or 1.0
    shares = [count / mean for count in work]
    axes.bar(range(len(work)), shares, color=[color_of(rank, len(work)) for rank in range(len(work))])
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_ylim(0, max(*shares, 1) * 1.15)
    axes.set_xlabel("rank")
    axes.set_title(f"busiest: {max(shares):.2f} of the mean", fontsize=9)
    if len(work) <= MOST_NUMBERED:
        axes.set_xticks(range(len(work)))
