"""Visualize: a picture in the terminal of which rank computes which part of an attention matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from cpcompile.inspect.areas import Matrix, cells
from cpcompile.inspect.colors import color_of
from cpcompile.inspect.masks import matrices
from cpcompile.inspect.text import short

MOST_CELLS, BAR = 32, 40  # of a line
BESIDE_BAR = 20  # the rank and its pairs


def visualize(
    mask: str = "causal",
    *,
    length: int,
    world_size: int,
    balancer: str = "zig_zag",
    window: int = 0,
    documents: Sequence[int] = (),
    parts: Sequence[int] = (),
    console: Console | None = None,
) -> None:
    """Print who computes which part of an attention matrix: queries down, keys across, the number of the rank in each cell.

    Args:
        mask: `causal`, `window`, `packed` (causal within documents) or `joint` (sequences behind one another, all see all).
        length: tokens.
        world_size: ranks that share them.
        balancer: which tokens each rank holds: `contiguous`, `zig_zag`, `balanced` or `zig_zag_by_document`.
        window: how many keys a query sees, its own included, for `window`.
        documents: tokens of each document, for `packed`.
        parts: tokens of each sequence, for `joint`.
        console: where it is printed.

    Raises:
        ConfigError: an argument is unknown, or does not belong to the mask.
    """
    (matrix,) = matrices(
        mask,
        length=length,
        world_size=world_size,
        layouts=[balancer],
        window=window,
        documents=documents,
        parts=parts,
    )
    (console or Console()).print(Picture(matrix, world_size))


@dataclass(frozen=True, slots=True)
class Picture:
    """The matrix as lines of coloured cells, and a bar with the work of each rank, as wide as where it is printed."""

    matrix: Matrix
    world_size: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield picture(self.matrix, self.world_size, options.max_width)


def picture(matrix: Matrix, world_size: int, columns: int) -> RenderableType:
    """Return the matrix as lines of coloured cells, and a bar with the work of each rank, in so many columns."""
    width = max(2, len(str(world_size - 1)) + 1)
    count = max(1, min(MOST_CELLS, matrix.length, columns // width))
    bar = max(1, min(BAR, columns - BESIDE_BAR))
    grid = [line_of(line, world_size, width) for line in cells(matrix, count)]
    longest = max(*matrix.work.values(), 1)
    bars = [
        Text.assemble(
            f"rank {rank:<3} ",
            ("█" * round(bar * work / longest), color_of(rank, world_size)),
            f" {short(work)} pairs",
        )
        for rank, work in matrix.work.items()
    ]
    of_cell = matrix.length / count
    head = f"{matrix.title}: {matrix.length} tokens on {world_size} ranks" + (
        f", {of_cell:.4g} tokens a cell" if of_cell > 1 else ""
    )
    return Group(Text(head), *grid, *bars)


def line_of(line: Sequence[dict[int, int]], world_size: int, width: int) -> Text:
    """Return a line of cells, each with the rank that computes most of it."""
    found = Text()
    for cell in line:
        if cell:
            rank = max(cell, key=lambda each: cell[each])
            found.append(f"{rank:>{width - 1}} ", f"#ffffff on {color_of(rank, world_size)}")
        else:
            found.append("·".rjust(width - 1) + " ", "dim")
    return found
