"""Schedule: which rectangles of the attention matrix a rank computes.

Rows and columns are runs of consecutive positions (chunks of the layout). What causality, the window or the documents hide
is cut away, so that most rectangles are wholly visible and a kernel needs no mask. Documents are contiguous: a run of rows
and an earlier run of columns are joined by one document at most, so that off the diagonal each block is one rectangle.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from cpcompile.balance.token_spans import Rectangle
from cpcompile.balance.token_spans import Segments as Segments
from cpcompile.balance.token_spans import Span as Span
from cpcompile.balance.token_spans import Spans as Spans
from cpcompile.balance.token_spans import Starts as Starts


@dataclass(frozen=True, slots=True)
class Band:
    """The bounds of kv - q, None for no bound: causal has high 0, a window of W low 1 - W."""

    low: int | None = None
    high: int | None = None


@dataclass(frozen=True, slots=True)
class Visible:
    """What the host knows of what rows see.

    Attributes:
        band: bounds of kv - q.
        segments: where documents begin; None: there are none, or that is not known.
        has_prefix: some columns are visible although `band.high` hides them.
        is_joined: only the order of slots matters to a kernel, not the positions, so that neighbours may be one piece.
    """

    band: Band
    segments: Segments | None = None
    has_prefix: bool = False
    is_joined: bool = True

    @property
    def is_varied(self) -> bool:
        """Whether sizes of rectangles follow the documents of a batch."""
        return self.segments is not None and any(len(starts) > 1 for starts in self.segments.rows)


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle to compute. Row i sees columns j with `low` <= j - i <= `high`, numbered within the piece.

    With `lengths`, rows and columns are the same documents, each of which sees itself only. With `rectangles`, only what lies
    in one of them is visible, and the bounds are counted from their last corners; positions of slots between them mean
    nothing. `batch` is the row of the batch it is for, None for all.
    """

    rows: Span
    columns: Span
    low: int | None = None
    high: int | None = None
    lengths: tuple[int, ...] = ()
    rectangles: tuple[Rectangle, ...] = ()
    batch: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether every row sees every column."""
        return self.low is None and self.high is None and not self.lengths and not self.rectangles

    @property
    def row_runs(self) -> tuple[slice, ...]:
        """Slots that hold all rows that see something, in order; the results of others among them are nothing."""
        return _runs(self.rows, [part.row_slice for part in self.rectangles])

    @property
    def column_runs(self) -> tuple[slice, ...]:
        """Slots that hold all columns that are seen, in order; the gradients of others among them are 0."""
        return _runs(self.columns, [part.column_slice for part in self.rectangles])


def _runs(span: Span, parts: list[slice]) -> tuple[slice, ...]:
    """Return the slots of some parts of a span, neighbours in one run, or all slots if no parts are given, or most are."""
    if not parts:
        return (span.slots,)
    runs: list[slice] = []
    for part in sorted(parts, key=lambda part: part.start):
        start, stop = span.slot + part.start, span.slot + part.stop
        if runs and start <= runs[-1].stop:
            runs[-1] = slice(runs[-1].start, max(stop, runs[-1].stop))
        else:
            runs.append(slice(start, stop))
    # To take a run costs the host 50 us, what lies between runs at most as much memory traffic again.
    return (span.slots,) if 2 * sum(run.stop - run.start for run in runs) >= span.size else tuple(runs)


def whole(length: int) -> tuple[Span, ...]:
    """Return the span of all tokens, in the user's order."""
    return (Span(0, 0, length),)


def num_tokens(spans: Iterable[Span]) -> int:
    """Return how many tokens there are in some spans."""
    return sum(span.size for span in spans)


def by_position(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the same tokens laid in the order of their positions, neighbours in one span."""
    laid: list[Span] = []
    slot = 0
    for span in sorted(spans, key=lambda s: s.position):
        if laid and laid[-1].end == span.position:
            laid[-1] = replace(laid[-1], size=laid[-1].size + span.size)
        else:
            laid.append(Span(slot, span.position, span.size))
        slot += span.size
    return tuple(laid)


@lru_cache(maxsize=4096)
def pieces(rows: Spans, columns: Spans, visible: Visible) -> tuple[Piece, ...]:
    """Return the rectangles that must be computed; rows and columns are in the order of their positions."""
    if visible.segments is None:
        return tuple(_pieces_of(rows, columns, visible, None))
    starts = visible.segments.rows
    found: list[Piece] = []
    for index, row in enumerate(starts):
        batch = None if len(starts) == 1 else index
        found += [replace(part, batch=batch) for part in _pieces_of(rows, columns, visible, row)]
    return tuple(found)


def _pieces_of(rows: Spans, columns: Spans, visible: Visible, starts: Starts | None) -> list[Piece]:
    band, is_joined = visible.band, visible.is_joined
    is_square = is_joined and starts is None and band == Band(None, 0) and not visible.has_prefix
    if is_square and rows and [r.positions for r in rows] == [c.positions for c in columns] and _are_dense(rows):
        # Slots are in the order of positions, so a rank against its own tokens is one causal square.
        size = sum(span.size for span in rows)
        square = Span(rows[0].slot, rows[0].position, size)
        return [Piece(square, replace(square, slot=columns[0].slot), high=0)]
    found: list[Piece] = []
    for row in rows:
        for column in _within_reach(row, columns, starts):
            for r, c in _rectangles(row, column, starts):
                found += _cut(r, c, band, visible.has_prefix)
    if not is_joined:
        return found
    return _join(found if starts is None else _group(found))


def _are_dense(spans: Sequence[Span]) -> bool:
    """Tell whether the slots of the spans follow each other."""
    return all(a.slots.stop == b.slot for a, b in pairwise(spans))


def _within_reach(row: Span, columns: Spans, starts: Starts | None) -> Spans:
    """Return the columns that hold some token of the documents of the rows."""
    if starts is None:
        return columns
    first = starts[bisect_right(starts, row.position) - 1]
    following = bisect_right(starts, row.end - 1)
    begin = bisect_right(columns, first, key=lambda span: span.end)
    if following == len(starts):
        return columns[begin:]
    return columns[begin : bisect_left(columns, starts[following], key=lambda span: span.position)]


def _rectangles(row: Span, column: Span, starts: Starts | None) -> Iterator[tuple[Span, Span]]:
    """Yield the parts of a rectangle within one document each."""
    if starts is None:
        yield row, column
        return
    for index in range(bisect_right(starts, max(row.position, column.position)) - 1, len(starts)):
        end = starts[index + 1] if index + 1 < len(starts) else max(row.end, column.end)
        r, c = (span.between(starts[index], end) for span in (row, column))
        if not r.size or not c.size:
            return
        yield r, c


def _cut(row: Span, column: Span, band: Band, has_prefix: bool) -> Iterator[Piece]:
    """Yield the visible part of one rectangle."""
    low, high = band.low, band.high
    if low is not None:
        column = column.between(row.position + low, column.end)
        row = row.between(row.position, column.end - low) if column.size else row
    if high is not None and not has_prefix:
        column = column.between(column.position, row.end + high)
        row = row.between(column.position - high, row.end)
    if not row.size or not column.size:
        return
    if low is None and high == 0 and not has_prefix and column.position < row.position < column.end:
        # Kernels know causal squares best; what lies before the square is wholly visible.
        yield Piece(row, column.between(column.position, row.position))
        column = column.between(row.position, column.end)
    offset = row.position - column.position
    local_low, local_high = (None if x is None else x + offset for x in (low, high))
    if local_low is not None and local_low <= 1 - row.size:
        local_low = None
    if local_high is not None and local_high >= column.size - 1:
        local_high = None
    yield Piece(row, column, local_low, local_high)


def _group(found: list[Piece]) -> list[Piece]:
    """Join squares of neighbouring documents, which one call of a kernel for variable lengths computes."""
    grouped: list[Piece] = []
    for piece in found:
        joined = _grouped(grouped[-1], piece) if grouped else None
        if joined is None:
            grouped.append(piece)
        else:
            grouped[-1] = joined
    return grouped


def _grouped(a: Piece, b: Piece) -> Piece | None:
    """Return two neighbouring squares as one piece, or None where they are none."""
    follows = a.rows.slots.stop == b.rows.slot and a.columns.slots.stop == b.columns.slot
    are_squares = all(x.rows.positions == x.columns.positions and x.rows.size for x in (a, b))
    if not follows or not are_squares:
        return None
    # Both squares have one band; a bound that a short document does not feel is None.
    low, high = (x if x is not None else y for x, y in ((a.low, b.low), (a.high, b.high)))
    rows, columns = (replace(x, size=x.size + b.rows.size) for x in (a.rows, a.columns))
    return replace(
        a, rows=rows, columns=columns, low=low, high=high, lengths=(*(a.lengths or (a.rows.size,)), b.rows.size)
    )


def _join(found: list[Piece]) -> list[Piece]:
    """Join neighbours that are wholly visible into fewer, larger kernel calls."""
    joined: list[Piece] = []
    for piece in found:
        last = joined[-1] if joined else None
        plain = last is not None and piece.is_full and last.is_full
        if plain and last and last.columns == piece.columns and last.rows.slots.stop == piece.rows.slot:
            joined[-1] = replace(last, rows=replace(last.rows, size=last.rows.size + piece.rows.size))
        elif plain and last and last.rows == piece.rows and last.columns.slots.stop == piece.columns.slot:
            joined[-1] = replace(last, columns=replace(last.columns, size=last.columns.size + piece.columns.size))
        else:
            joined.append(piece)
    return joined
