"""Token spans: runs of tokens and where they are held, and where the documents of a sequence begin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

Starts = tuple[int, ...]  # where documents begin


@dataclass(frozen=True, slots=True)
class Span:
    """`size` tokens at consecutive positions, held in consecutive slots."""

    slot: int
    position: int
    size: int

    @property
    def end(self) -> int:
        """The position after the last token."""
        return self.position + self.size

    @property
    def slots(self) -> slice:
        """The slots as an index."""
        return slice(self.slot, self.slot + self.size)

    @property
    def positions(self) -> slice:
        """The positions as an index of a tensor that holds all tokens."""
        return slice(self.position, self.end)

    def between(self, start: int, end: int) -> Span:
        """Return the part at positions [start, end)."""
        start, end = max(start, self.position), min(end, self.end)
        return Span(self.slot + start - self.position, start, max(end - start, 0))


Spans = tuple[Span, ...]


class Rectangle(NamedTuple):
    """Some consecutive rows and columns of a larger rectangle: `row` and `column` are the first ones."""

    row: int
    rows: int
    column: int
    columns: int

    @property
    def row_slice(self) -> slice:
        """The rows as an index."""
        return slice(self.row, self.row + self.rows)

    @property
    def column_slice(self) -> slice:
        """The columns as an index."""
        return slice(self.column, self.column + self.columns)


class Segments:
    """Where documents begin, for each row of the batch or for all. Equal ones are one object, compared at no cost."""

    __slots__ = ("rows",)

    def __init__(self, rows: tuple[Starts, ...]) -> None:
        self.rows = rows

    @staticmethod
    @lru_cache(maxsize=64)
    def of(rows: tuple[Starts, ...]) -> Segments:
        """Return the segments of these starts."""
        return Segments(rows)
