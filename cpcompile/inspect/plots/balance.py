"""Balance: the work of each rank by balancer, for one mix of documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpcompile.balance import BALANCERS, simulate
from cpcompile.inspect.plots.canvas import canvas
from cpcompile.inspect.plots.mask import draw_work, highest

NAMES = [name for name in BALANCERS if name != "llama3"]  # which computes what `contiguous` does


def work_by_balancer(length: int, world_size: int, cu_seqlens: Sequence[int]) -> dict[str, list[float]]:
    """Return the pairs of a query and a key that each rank computes, causal and within documents."""
    bounds = list(cu_seqlens)
    return {name: simulate(BALANCERS[name], length, world_size, bounds).area.tolist() for name in NAMES}


def plot_balance(work: dict[str, list[float]], title: str, out: Path) -> None:
    """Draw the work of each rank, a panel for each balancer."""
    columns = 3
    lines = -(-len(work) // columns)
    with canvas(out, lines, columns, (10, 0.6 + 2.7 * lines)) as (figure, panels):
        top = highest(work.values())
        for axes, (name, each) in zip(panels.flat, work.items(), strict=False):
            draw_work(axes, each, top)
            axes.set_title(f"{name}\n{axes.get_title()}", fontsize=9)
        for axes in panels.flat[len(work) :]:
            axes.set_axis_off()
        figure.suptitle(title, fontsize=11)
