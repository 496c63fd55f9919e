"""Areas: which part of the attention matrix each rank computes, as polygons over the positions of keys and queries.

8 tokens on 2 ranks, causal, a cell for each pair of a query (down) and a key (across), with the rank that computes it:

    contiguous  0 . . . . . . .      zig_zag  0 . . . . . . .
                0 0 . . . . . .               0 0 . . . . . .
                0 0 0 . . . . .               1 1 1 . . . . .
                0 0 0 0 . . . .               1 1 1 1 . . . .
                1 1 1 1 1 . . .               1 1 1 1 1 . . .
                1 1 1 1 1 1 . .               1 1 1 1 1 1 . .
                1 1 1 1 1 1 1 .               0 0 0 0 0 0 0 .
                1 1 1 1 1 1 1 1               0 0 0 0 0 0 0 0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Segments, Spans
from cpcompile.runtime.attention.workload import Workload, pairs
from cpcompile.runtime.schedule import Piece, Visible, pieces, whole

Point = tuple[float, float]  # a key and a query position


@dataclass(frozen=True, slots=True)
class Area:
    """What a rank computes of one rectangle.

    Attributes:
        rank: who computes it.
        piece: the rectangle and its bounds.
        corners: of the visible part. The stairs of a bound are a straight line through the middles of their steps.
    """

    rank: int
    piece: Piece
    corners: tuple[Point, ...]

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key are visible."""
        return pairs(self.piece)

    @property
    def size(self) -> float:
        """What the polygon covers, in pairs: at each end of a bound it may be 1/8 of a pair off."""
        corners = (*self.corners, *self.corners[:1])
        return abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in pairwise(corners))) / 2


@dataclass(frozen=True, slots=True)
class Matrix:
    """One attention matrix and the ranks that share it.

    Attributes:
        title: which tokens, layout or heads it is of.
        length: tokens.
        rows: the queries of each rank.
        visible: what queries see.
        heads: that are computed alike, over the batch.
    """

    title: str
    length: int
    rows: Mapping[int, Spans]
    visible: Visible
    heads: int = 1

    def pieces_of(self, rank: int) -> tuple[Piece, ...]:
        """Return the rectangles of a rank, each within one run of its queries."""
        return pieces(self.rows[rank], whole(self.length), replace(self.visible, is_joined=False))

    @property
    def areas(self) -> tuple[Area, ...]:
        """All parts that are computed, rank by rank."""
        return tuple(Area(rank, piece, corners_of(piece)) for rank in self.rows for piece in self.pieces_of(rank))

    @property
    def work(self) -> dict[int, int]:
        """How many pairs of a query and a key each rank computes, over all heads."""
        return {rank: self.heads * sum(map(pairs, self.pieces_of(rank))) for rank in self.rows}


def matrix_of(
    length: int,
    world_size: int,
    layout: str,
    visible: Visible,
    *,
    documents: Sequence[int] = (),
    parts: Sequence[int] = (),
) -> Matrix:
    """Return the matrix of one attention by rows.

    Args:
        length: tokens of the sequence.
        world_size: ranks that share it.
        layout: which tokens each rank holds.
        visible: what queries see, documents apart.
        documents: where they begin, for packed ones.
        parts: tokens of each sequence that is joined to one, each dealt to the ranks for itself.
    """
    segments = Segments.of((tuple(documents),)) if documents else None
    if parts:
        spans = Arrangement(tuple((tokens, 1) for tokens in parts), world_size, layout).spans
    else:
        spans = TokenOrder(length, world_size, layout, segments).spans
    return Matrix(layout, length, dict(enumerate(spans)), replace(visible, segments=segments))


def matrices_of(workload: Workload, strategy: str) -> tuple[Matrix, ...]:
    """Return the matrix of each share of the heads, with the ranks that compute these."""
    inner = workload.inner(strategy)
    found = []
    first = 0
    for index, heads in enumerate(workload.heads_of(strategy)):
        title = f"heads {first} to {first + heads.num_query - 1}" if inner > 1 else workload.layout
        first += heads.num_query
        rows = {outer * inner + index: workload.rows(strategy, outer) for outer in range(workload.world_size // inner)}
        found.append(Matrix(title, workload.length, rows, workload.visible, workload.batch * heads.num_query))
    return tuple(found)


def by_own_rows(workload: Workload, layout: str) -> Matrix:
    """Return the matrix where every rank computes the queries that it holds, in a layout."""
    spans = replace(workload, layout=layout).spans
    rows = {rank: spans(rank) for rank in range(workload.world_size)}
    return Matrix(layout, workload.length, rows, workload.visible, workload.batch * workload.heads)


def corners_of(piece: Piece) -> tuple[Point, ...]:
    """Return the corners of the visible part of a rectangle, at the positions of its tokens."""
    height, width = piece.rows.size, piece.columns.size
    corners: list[Point] = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
    # Row i ends behind column i + high, which is at i + high + 1: the line through y = i + 1/2.
    if piece.high is not None:
        corners = left_of(corners, piece.high + 0.5)
    if piece.low is not None:
        corners = [(x, y) for y, x in left_of([(y, x) for x, y in corners], 0.5 - piece.low)]
    return tuple((x + piece.columns.position, y + piece.rows.position) for x, y in corners)


def left_of(corners: Sequence[Point], offset: float) -> list[Point]:
    """Return the part of a convex polygon with x - y <= offset."""
    kept: list[Point] = []
    for a, b in zip(corners, (*corners[1:], *corners[:1]), strict=True):
        over_a, over_b = (x - y - offset for x, y in (a, b))
        if over_a <= 0:
            kept.append(a)
        if over_a * over_b < 0:
            share = over_a / (over_a - over_b)
            kept.append((a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])))
    return kept


def cells(matrix: Matrix, count: int) -> list[list[dict[int, int]]]:
    """Return the matrix as `count` x `count` cells: how many pairs of each each rank computes."""
    edges = [matrix.length * i // count for i in range(count + 1)]
    found: list[list[dict[int, int]]] = [[{} for _ in range(count)] for _ in range(count)]
    for area in matrix.areas:
        for row, (top, bottom) in enumerate(pairwise(edges)):
            for column, (left, right) in enumerate(pairwise(edges)):
                seen = pairs_within(area.piece, (top, bottom), (left, right))
                if seen:
                    cell = found[row][column]
                    cell[area.rank] = cell.get(area.rank, 0) + seen
    return found


def pairs_within(piece: Piece, rows: tuple[int, int], columns: tuple[int, int]) -> int:
    """Return how many pairs of a rectangle are visible between these positions."""
    row, column = piece.rows.between(*rows), piece.columns.between(*columns)
    if not row.size or not column.size:
        return 0
    moved = (row.position - piece.rows.position) - (column.position - piece.columns.position)
    low, high = (None if bound is None else bound + moved for bound in (piece.low, piece.high))
    return pairs(Piece(row, column, low, high))
