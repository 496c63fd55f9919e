"""Schedule: which rectangles of the attention matrix a rank computes, and which of them need a mask.

Rows and columns are runs of consecutive positions (chunks of the layout). Rectangles that causality or the window hides are
left out, those that are wholly visible go to the kernel without a mask, and so does a causal square on the diagonal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cpcompile.layout import chunk_length, rank_chunks


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


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle to compute: all of it, its lower triangle (`is_causal`), or what a mask leaves (`is_masked`)."""

    rows: Span
    columns: Span
    is_causal: bool = False
    is_masked: bool = False


def whole(length: int) -> tuple[Span, ...]:
    """Return the span of all tokens, in the user's order."""
    return (Span(0, 0, length),)


def local_spans(length: int, rank: int, world_size: int, layout: str) -> tuple[Span, ...]:
    """Return the spans of the tokens that `rank` holds, without padding."""
    size = chunk_length(length, world_size, layout)
    chunks = enumerate(rank_chunks(rank, world_size, layout))
    spans = (Span(i * size, chunk * size, min(size, length - chunk * size)) for i, chunk in chunks)
    return tuple(span for span in spans if span.size > 0)


def pieces(
    rows: Sequence[Span], columns: Sequence[Span], *, is_causal: bool, window: int, needs_mask: bool
) -> list[Piece]:
    """Return the rectangles that must be computed. `needs_mask`: more than causality and the window hides keys."""
    if is_causal and not window and not needs_mask and rows == columns and rows:
        # Slots are in the order of positions, so a rank against its own tokens is one causal square.
        size = sum(span.size for span in rows)
        square = Span(0, 0, size)
        return [Piece(square, square, is_causal=True)]
    found = [
        piece
        for row in rows
        for column in columns
        for piece in _cut(row, column, is_causal=is_causal, window=window, needs_mask=needs_mask)
    ]
    return _join(found)


def _cut(row: Span, column: Span, *, is_causal: bool, window: int, needs_mask: bool) -> Iterator[Piece]:
    """Yield the visible part of one rectangle."""
    first = row.position - window + 1 if window else column.position
    column = column.between(first, row.end if is_causal else column.end)
    if not column.size or not row.size:
        return
    beyond_window = window > 0 and row.end - 1 - column.position >= window
    if needs_mask or beyond_window:
        yield Piece(row, column, is_masked=True)
    elif not is_causal or column.end <= row.position + 1:
        yield Piece(row, column)
    elif column.position <= row.position and column.end == row.end:
        past = column.between(column.position, row.position)
        if past.size:
            yield Piece(row, past)
        yield Piece(row, column.between(row.position, row.end), is_causal=True)
    else:
        yield Piece(row, column, is_masked=True)


def _join(found: list[Piece]) -> list[Piece]:
    """Join neighbours without a mask into fewer, larger kernel calls; only their slots matter to a kernel."""
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        plain = last is not None and not (piece.is_causal or piece.is_masked or last.is_causal or last.is_masked)
        if plain and last and last.columns == piece.columns and last.rows.slots.stop == piece.rows.slot:
            joined[-1] = replace(last, rows=replace(last.rows, size=last.rows.size + piece.rows.size))
        elif plain and last and last.rows == piece.rows and last.columns.slots.stop == piece.columns.slot:
            joined[-1] = replace(last, columns=replace(last.columns, size=last.columns.size + piece.columns.size))
        else:
            joined.append(piece)
    return joined
