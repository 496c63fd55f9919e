"""Calls: which rectangles, or which parts of one, a call of a kernel computes.

A kernel of variable lengths takes many rectangles at once, of any sizes. Others plan for each size that they see: they get
one rectangle a call, of sizes that recur from batch to batch as far as that goes. And some kernels know windows only where
rows and columns are the same tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import groupby

from cpcompile.balance.token_spans import Rectangle, Span
from cpcompile.runtime.schedule import Piece

LONG, STEP = 2048, 512  # tokens from which on sizes that recur are worth while, and of which they are multiples

Pieces = tuple[Piece, ...]


@lru_cache(maxsize=4096)
def of_known_widths(pieces: Pieces) -> Pieces:
    """Return the pieces with long rectangles cut to a width that recurs, for which kernels have a plan, and the rest."""
    return tuple(part for piece in pieces for part in _of_known_width(piece))


def _of_known_width(piece: Piece) -> Iterator[Piece]:
    width = piece.columns.size // STEP * STEP
    if not piece.is_full or width == piece.columns.size or min(width, piece.rows.size) < LONG:
        yield piece
        return
    middle = piece.columns.position + width
    yield replace(piece, columns=piece.columns.between(piece.columns.position, middle))
    yield replace(piece, columns=piece.columns.between(middle, piece.columns.end))


@lru_cache(maxsize=4096)
def windows_apart(pieces: Pieces) -> Pieces:
    """Return the pieces with each long causal window that begins before its rows as one of the rows alone, and what is before."""
    return tuple(part for piece in pieces for part in _window_apart(piece))


def _window_apart(piece: Piece) -> Iterator[Piece]:
    rows, columns = piece.rows, piece.columns
    before = columns.size - rows.size
    if piece.low is None or piece.high != before or before <= 0 or rows.size <= piece.high - piece.low:
        yield piece
        return
    first, last = (Span(columns.slot + at, columns.position + at, n) for at, n in ((0, before), (before, rows.size)))
    reach = before - piece.low  # the rows that see some column before theirs
    low = piece.low if piece.low > 1 - reach else None
    yield replace(piece, rows=replace(rows, size=reach), columns=first, low=low, high=None)
    yield replace(piece, columns=last, low=piece.low - before, high=0)


@lru_cache(maxsize=4096)
def together(pieces: Pieces, for_backward: bool) -> Pieces:
    """Return the pieces as few calls of a kernel that takes many rectangles.

    Causal squares go together, and whole rectangles do. No row is in two rectangles of a call, for backward no column either.
    For forward a square takes what is wholly visible before it with it; backward computes what such a rectangle hides (cuDNN
    9.19). Other pieces stay as they are.
    """
    found: list[Piece] = []
    for _, group in groupby(pieces, key=lambda piece: piece.batch):
        found += _together(list(group), for_backward)
    return tuple(found)


def _together(pieces: Sequence[Piece], for_backward: bool) -> Iterator[Piece]:
    full = {(piece.rows.slot, piece.rows.size, piece.columns.slots.stop): piece for piece in pieces if piece.is_full}
    causal: list[Piece] = []
    for piece in pieces:
        if piece.is_full:
            continue
        if piece.low is not None or piece.high != 0 or piece.rows.size != piece.columns.size:
            yield piece
            continue
        for square in _squares(piece):
            key = square.rows.slot, square.rows.size, square.columns.slot
            before = None if for_backward else full.pop(key, None)
            if before is not None:
                size = before.columns.size + square.columns.size
                square = replace(square, columns=replace(before.columns, size=size))
            causal.append(square)
    for parts in (causal, list(full.values())):
        for apart in _apart(parts, for_backward):
            yield _one(apart)


def _squares(piece: Piece) -> Iterator[Piece]:
    """Yield the squares of a piece of several documents."""
    start = 0
    for length in piece.lengths or (piece.rows.size,):
        rows, columns = (Span(span.slot + start, span.position + start, length) for span in (piece.rows, piece.columns))
        yield replace(piece, rows=rows, columns=columns, lengths=())
        start += length


def _apart(pieces: Sequence[Piece], for_backward: bool) -> list[list[Piece]]:
    """Return the pieces in groups of which no two share rows, for backward columns either."""
    groups: list[tuple[list[Piece], tuple[_Taken, ...]]] = []
    for piece in pieces:
        spans = (piece.rows, piece.columns) if for_backward else (piece.rows,)
        fits = (g for g in groups if not any(taken.meets(span) for taken, span in zip(g[1], spans, strict=True)))
        group = next(fits, None)
        if group is None:
            group = [], tuple(_Taken() for _ in spans)
            groups.append(group)
        group[0].append(piece)
        for taken, span in zip(group[1], spans, strict=True):
            taken.add(span)
    return [members for members, _ in groups]


class _Taken:
    """Runs of slots of which no two meet."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def meets(self, span: Span) -> bool:
        """Tell whether some slot of a span is in a run."""
        before = bisect_left(self._starts, span.slots.stop) - 1
        return before >= 0 and self._stops[before] > span.slot

    def add(self, span: Span) -> None:
        """Add a span that meets none."""
        at = bisect_left(self._starts, span.slot)
        self._starts.insert(at, span.slot)
        self._stops.insert(at, span.slots.stop)


def _one(pieces: Sequence[Piece]) -> Piece:
    """Return pieces of one band as one."""
    first = pieces[0]
    if len(pieces) == 1 and (first.is_full or first.rows.size == first.columns.size):
        return first
    rows, columns = (_hull([getattr(piece, name) for piece in pieces]) for name in ("rows", "columns"))
    rectangles = tuple(
        Rectangle(p.rows.slot - rows.slot, p.rows.size, p.columns.slot - columns.slot, p.columns.size) for p in pieces
    )
    return replace(first, rows=rows, columns=columns, rectangles=rectangles)


def _hull(spans: Sequence[Span]) -> Span:
    first = min(spans, key=lambda span: span.slot)
    return replace(first, size=max(span.slots.stop for span in spans) - first.slot)
