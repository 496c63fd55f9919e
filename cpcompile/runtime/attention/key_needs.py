"""Key needs: which keys the ranks need of each other, and what each computes with the keys of every other."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from cpcompile.balance.token_spans import Span, Spans
from cpcompile.runtime.schedule import Piece, Visible, by_position, num_tokens, pieces

# Tokens between two runs of documents that a ring fetches rather than take another run: each costs the host some 0.1 ms in
# copies and sums, and so many tokens of 8 key heads of 128 take NVLink 0.02 ms.
GAP = 2048


def needed(parts: Sequence[Piece], columns: Sequence[Span]) -> tuple[Span, ...]:
    """Return which tokens of `columns`, which are in the order of their slots, some piece reads: one run of each span."""
    seen: dict[int, tuple[int, int]] = {}
    for part in parts:
        read = part.columns.slots
        for index in range(bisect_right(columns, read.start, key=lambda span: span.slot) - 1, len(columns)):
            span = columns[index].slots
            start, stop = max(read.start, span.start), min(read.stop, span.stop)
            if start >= stop:
                break
            first, last = seen.get(index, (start, stop))
            seen[index] = min(first, start), max(last, stop)
    found = ((columns[index], *seen[index]) for index in sorted(seen))
    return tuple(Span(start, span.position + start - span.slot, stop - start) for span, start, stop in found)


def joined(spans: Sequence[Span], gap: int = 0) -> tuple[Span, ...]:
    """Return runs with at most `gap` slots between them as one; each has the position of its first token."""
    found: list[Span] = []
    for span in spans:
        last = found[-1] if found else None
        if last is not None and span.slot - last.slots.stop <= gap:
            found[-1] = replace(last, size=span.slots.stop - last.slot)
        else:
            found.append(span)
    return tuple(found)


def packed(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Return the same tokens in consecutive slots from 0."""
    ends, slot = [], 0
    for span in spans:
        ends.append(replace(span, slot=slot))
        slot += span.size
    return tuple(ends)


@dataclass(frozen=True, slots=True, eq=False)
class Needs:
    """What the ranks of a ring need of each other.

    Attributes:
        of: for each receiver and source some runs of the source's tokens, in the slots of the source.
        held: for each receiver all that it needs, in the order of positions.
        within: for each receiver and source where the runs of `of` are in what the receiver holds.
        runs: as `of`, neighbouring slots in one run: what a ring fetches.
        laid: where these are when they lie one after the other.
        steps: those at which some rank needs something of the rank that many before it.
    """

    of: tuple[tuple[Spans, ...], ...]
    held: tuple[Spans, ...]
    within: tuple[tuple[Spans, ...], ...]
    runs: tuple[tuple[Spans, ...], ...]
    laid: tuple[tuple[Spans, ...], ...]
    steps: tuple[int, ...]


@lru_cache(maxsize=256)
def needs(spans: tuple[Spans, ...], visible: Visible) -> Needs:
    """Return what each rank needs of each other, for the tokens that they hold."""
    ranks = range(len(spans))
    of = tuple(tuple(needed(pieces(spans[r], spans[s], visible), spans[s]) for s in ranks) for r in ranks)
    steps = tuple(t for t in ranks if t and any(of[r][(r - t) % len(spans)] for r in ranks))
    held = tuple(by_position([span for runs in of[r] for span in runs]) for r in ranks)
    within = tuple(tuple(tuple(place(span, held[r]) for span in of[r][s]) for s in ranks) for r in ranks)
    gap = GAP if visible.is_varied else 0
    runs = tuple(tuple(joined(found, gap) for found in of_receiver) for of_receiver in of)
    laid = tuple(tuple(map(packed, of_receiver)) for of_receiver in runs)
    return Needs(of, held, within, runs, laid, steps)


@dataclass(frozen=True, slots=True, eq=False)
class Visit:
    """What a rank of a ring computes with the keys of the rank `step` before it.

    `num_columns` tokens are fetched; the columns of `pieces` are in the slots of these.
    """

    step: int
    num_columns: int
    pieces: tuple[Piece, ...]


@lru_cache(maxsize=256)
def visits(spans: tuple[Spans, ...], visible: Visible, rank: int) -> tuple[Visit, ...]:
    """Return what a rank computes: with its own keys, and at each step at which some rank sees something of another's."""
    plan, found = needs(spans, visible), []
    for step in (0, *plan.steps):
        source = (rank - step) % len(spans)
        fetched = plan.runs[rank][source]
        columns = _relaid(plan.of[rank][source], fetched, plan.laid[rank][source]) if step else spans[rank]
        found.append(Visit(step, num_tokens(fetched), pieces(spans[rank], columns, visible)))
    return tuple(found)


def _relaid(spans: Spans, runs: Spans, laid: Spans) -> tuple[Span, ...]:
    """Return tokens that are in some runs of slots where these runs are laid."""
    at = [bisect_right(runs, span.slot, key=lambda run: run.slot) - 1 for span in spans]
    return tuple(replace(span, slot=laid[i].slot + span.slot - runs[i].slot) for i, span in zip(at, spans, strict=True))


def place(span: Span, held: Spans) -> Span:
    """Return the same tokens in the slots of `held`."""
    run = held[bisect_right(held, span.position, key=lambda h: h.position) - 1]
    assert run.position <= span.position < run.end
    return run.between(span.position, span.end)
