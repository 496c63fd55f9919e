"""The schedule: the rectangles cover what is visible, each pair once, whatever hides keys; ranks get what their rows see."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS, of_groups
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Segments, Span, Spans
from cpcompile.runtime.attention import key_needs
from cpcompile.runtime.attention.key_needs import Needs, needs, visits
from cpcompile.runtime.kernels import calls
from cpcompile.runtime.schedule import Band, Piece, Visible, by_position, pieces, whole

GAP = 3
BANDS = st.one_of(
    st.builds(Band, st.one_of(st.none(), st.integers(-9, 0)), st.just(0)),
    st.builds(Band, st.one_of(st.none(), st.integers(-9, 0)), st.one_of(st.none(), st.integers(0, 7))),
)


@pytest.fixture(autouse=True, scope="module")
def short_rectangles_are_long() -> Iterator[None]:
    """Let rectangles of a few tokens be cut into widths that recur, and a few tokens be too many to be fetched in vain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "LONG", 4)
        patch.setattr(calls, "STEP", 2)
        patch.setattr(key_needs, "GAP", GAP)
        forget()
        yield
    forget()


def forget() -> None:
    for function in (pieces, needs, visits, calls.of_known_widths):
        function.cache_clear()


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, str, Visible]:
    """Draw (length, ranks, layout, what is visible)."""
    length = draw(st.integers(1, 40))
    segments = None
    if draw(st.booleans()):
        starts = draw(st.lists(st.sets(st.integers(0, length - 1)), min_size=1, max_size=2))
        segments = Segments.of(tuple(tuple(sorted({0, *row})) for row in starts))
    visible = Visible(draw(BANDS), segments, is_joined=draw(st.booleans()))
    world_size, layout = draw(st.integers(1, 6)), draw(st.sampled_from((*LAYOUTS, *DOCUMENT_LAYOUTS)))
    sizes = [size for size in range(1, world_size + 1) if world_size % size == 0] if layout in DOCUMENT_LAYOUTS else [1]
    return length, world_size, of_groups(layout, draw(st.sampled_from(sizes))), visible


def seen(length: int, visible: Visible) -> torch.Tensor:
    """Return which keys each query sees, `[rows of segments or 1, length, length]`."""
    q, k = torch.arange(length)[:, None], torch.arange(length)
    mask = torch.ones(1, length, length, dtype=torch.bool)
    if visible.band.low is not None:
        mask = mask & (k - q >= visible.band.low)
    if visible.band.high is not None:
        mask = mask & (k - q <= visible.band.high)
    if visible.segments is None:
        return mask
    starts = [torch.tensor(row) for row in visible.segments.rows]
    ids = torch.stack([torch.searchsorted(row, torch.arange(length), right=True) for row in starts])
    return mask & (ids[:, :, None] == ids[:, None])


def positions_of(spans: Spans) -> torch.Tensor:
    """Return the position of each slot that some span holds."""
    slots = torch.full((max((s.slots.stop for s in spans), default=0),), -1)
    for span in spans:
        slots[span.slots] = torch.arange(span.position, span.end)
    return slots


def add(covered: torch.Tensor, piece: Piece, rows: torch.Tensor, columns: torch.Tensor) -> None:
    """Count the pairs that a kernel computes for a piece; rows and columns are the positions of all slots."""
    q, k = rows[piece.rows.slots], columns[piece.columns.slots]
    i, j = torch.arange(len(q))[:, None], torch.arange(len(k))
    inside = torch.ones(len(q), len(k), dtype=torch.bool)
    if piece.rectangles:
        inside, j = ~inside, j.expand(len(q), -1).clone()
        for part in piece.rectangles:
            assert not inside[part.row_slice].any(), "a row is in one rectangle"
            inside[part.row_slice, part.column_slice] = True
            j[part.row_slice] -= part.column + part.columns - part.row - part.rows
        for slots, runs, dim in ((piece.rows.slots, piece.row_runs, 1), (piece.columns.slots, piece.column_runs, 0)):
            taken = {n for run in runs for n in range(run.start, run.stop)}
            assert {n + slots.start for n in inside.any(dim).nonzero().flatten().tolist()} <= taken
            assert len(runs) == 1 or 2 * len(taken) < slots.stop - slots.start
    if piece.low is not None:
        inside &= j - i >= piece.low
    if piece.high is not None:
        inside &= j - i <= piece.high
    if piece.lengths:
        assert sum(piece.lengths) == len(q) == len(k)
        document = torch.repeat_interleave(torch.tensor(piece.lengths))
        inside &= document[:, None] == document
    for index in range(len(covered)) if piece.batch is None else (piece.batch,):
        covered[index, q[:, None], k] += inside.long()


@settings(deadline=None, max_examples=150)
@given(problems())
def test_pieces_cover_what_is_visible_once(problem: tuple[int, int, str, Visible]) -> None:
    length, world_size, layout, visible = problem
    expected = seen(length, visible)
    covered = torch.zeros(expected.shape, dtype=torch.int64)
    spans = TokenOrder(length, world_size, layout, visible.segments).spans
    plan = needs(spans, visible)
    for rank, rows in enumerate(spans):
        for visit in visits(spans, visible, rank):
            source = (rank - visit.step) % world_size
            columns = positions_of(spans[source])
            if visit.step:  # what a rank fetches is enough
                columns = torch.cat([columns[run.slots] for run in plan.runs[rank][source]] or [columns[:0]])
                assert len(columns) == visit.num_columns
            for piece in visit.pieces:
                add(covered, piece, positions_of(rows), columns)
    assert torch.equal(covered, expected.long())


@settings(deadline=None, max_examples=80)
@given(problems())
def test_gathered_pieces_cover_what_is_visible_once(problem: tuple[int, int, str, Visible]) -> None:
    length, world_size, layout, visible = problem
    expected = seen(length, visible)
    covered = torch.zeros(expected.shape, dtype=torch.int64)
    spans = TokenOrder(length, world_size, layout, visible.segments).spans
    plan = needs(spans, visible)
    for rows, held in zip(spans, plan.held, strict=True):
        for piece in pieces(rows, held, visible):
            add(covered, piece, positions_of(rows), positions_of(held))
    assert torch.equal(covered, expected.long())


@settings(deadline=None, max_examples=100)
@given(problems(), st.booleans())
def test_calls_cover_what_is_visible_once(problem: tuple[int, int, str, Visible], for_backward: bool) -> None:
    length, world_size, layout, visible = problem
    expected = seen(length, visible)
    spans = TokenOrder(length, world_size, layout, visible.segments).spans
    for calls_of in (
        calls.of_known_widths,
        calls.windows_apart,
        lambda found: calls.together(found, for_backward),
        lambda found: calls.together(calls.windows_apart(found), for_backward),
    ):
        covered = torch.zeros(expected.shape, dtype=torch.int64)
        for rows, held in zip(spans, needs(spans, visible).held, strict=True):
            for piece in calls_of(pieces(rows, held, visible)):
                add(covered, piece, positions_of(rows), positions_of(held))
                if for_backward:
                    assert sum(part.columns for part in piece.rectangles) <= piece.columns.size
        assert torch.equal(covered, expected.long())


def test_a_long_window_is_computed_as_that_of_the_own_tokens_and_what_is_before() -> None:
    (piece,) = pieces((Span(0, 100, 20),), (Span(3, 93, 27),), Visible(Band(-7, 0)))
    before, own = calls.windows_apart((piece,))
    assert (own.low, own.high, own.rows, own.columns) == (-7, 0, Span(0, 100, 20), Span(10, 100, 20))
    assert (before.low, before.high, before.rows, before.columns) == (0, None, Span(0, 100, 7), Span(3, 93, 7))
    short = pieces((Span(0, 100, 7),), (Span(3, 93, 14),), Visible(Band(-7, 0)))
    assert calls.windows_apart(short) == short


def test_a_kernel_of_variable_lengths_computes_what_a_rank_holds_in_few_calls() -> None:
    segments = Segments.of((tuple(range(0, 640, 40)),))
    visible = Visible(Band(None, 0), segments)
    spans = TokenOrder(640, 4, "zig_zag_by_document", segments).spans
    for rows, held in list(zip(spans, needs(spans, visible).held, strict=True))[:-1]:
        found = pieces(rows, held, visible)
        assert len(found) > 30
        assert len(calls.together(found, for_backward=False)) == 1
        # Squares are for themselves, and the rows of both chunks of a document see the keys before the first.
        assert len(calls.together(found, for_backward=True)) <= 3


@settings(deadline=None, max_examples=80)
@given(problems())
def test_what_is_held_is_what_is_needed(problem: tuple[int, int, str, Visible]) -> None:
    length, world_size, layout, visible = problem
    spans = TokenOrder(length, world_size, layout, visible.segments).spans
    plan = needs(spans, visible)
    for receiver in range(world_size):
        at = positions_of(plan.held[receiver])
        assert at.tolist() == sorted(at.tolist())
        for source in range(world_size):
            owned = positions_of(spans[source])
            for own, there in zip(plan.of[receiver][source], plan.within[receiver][source], strict=True):
                assert torch.equal(owned[own.slots], at[there.slots])
            slots, fetched = (
                [slot for run in found[receiver][source] for slot in range(run.slots.start, run.slots.stop)]
                for found in (plan.of, plan.runs)
            )
            runs, laid = plan.runs[receiver][source], plan.laid[receiver][source]
            gap = GAP if visible.is_varied else 0
            assert set(slots) <= set(fetched)
            assert [slots[0], slots[-1]] == [fetched[0], fetched[-1]] if slots else not fetched
            assert all(a.slots.stop + gap < b.slot for a, b in pairwise(runs))
            assert gap or slots == fetched
            assert [slot for span in laid for slot in range(span.slots.start, span.slots.stop)] == [
                *range(len(fetched))
            ]
    sent = {t for t in range(1, world_size) for r in range(world_size) if plan.of[r][(r - t) % world_size]}
    assert plan.steps == tuple(sorted(sent))


def needed_tokens(length: int, window: int, world_size: int = 4) -> int:
    """Return the most tokens that a rank fetches from the others."""
    spans = TokenOrder(length, world_size, "contiguous").spans
    plan: Needs = needs(spans, Visible(Band(1 - window, 0)))
    return max(
        sum(s.size for source in range(world_size) if source != rank for s in plan.of[rank][source])
        for rank in range(world_size)
    )


def test_a_window_needs_as_many_tokens_as_it_is_wide() -> None:
    assert needed_tokens(64, 5) == needed_tokens(4096, 5) == 4
    assert needed_tokens(4096, 100) == 99


def test_documents_are_one_piece() -> None:
    visible = Visible(Band(None, 0), Segments.of(((0, 3, 4, 9, 30),)))
    (piece,) = pieces(whole(40), whole(40), visible)
    assert (piece.rows, piece.lengths) == (Span(0, 0, 40), (3, 1, 5, 21, 10))


def test_only_several_documents_vary() -> None:
    assert [Visible(Band(), Segments.of(rows)).is_varied for rows in (((0,), (0, 4)), ((0,), (0,)))] == [True, False]
    assert not Visible(Band()).is_varied


def test_a_document_before_the_diagonal_is_one_rectangle() -> None:
    rows, columns = (Span(0, 16, 16),), (Span(0, 0, 16),)
    (piece,) = pieces(rows, columns, Visible(Band(None, 0), Segments.of(((0, 5, 12, 20),))))
    assert (piece.rows.positions, piece.columns.positions, piece.is_full) == (slice(16, 20), slice(12, 16), True)
    assert not pieces(rows, columns, Visible(Band(None, 0), Segments.of(((0, 5, 16),))))


def test_spans_by_position_join_neighbours() -> None:
    laid = by_position([Span(0, 8, 4), Span(4, 0, 4), Span(9, 4, 4)])
    assert laid == (Span(0, 0, 12),)
