"""All to all: tokens become heads or heads become tokens: every rank sends to every other, while something else is computed.

A message holds one tensor after the other. Of local tokens, what goes to each rank follows in turn, tokens first: ranks whose
heads are evenly apart are laid by one copy. Of heads, the tokens of the other ranks follow in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from cpcompile.runtime.transport.copies import Copies, Pair, kind_of, like
from cpcompile.runtime.transport.messages import tokens_first
from cpcompile.runtime.transport.post import Ring, Transfer, new_message, post

Tensor = torch.Tensor
Heads = Sequence[Sequence[slice]]  # for each rank, its heads of each tensor
Places = Sequence[Sequence[tuple[slice, slice]]]  # for each rank, runs of its slots and where they are among all tokens


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one rank copies to exchange the heads of tensors of some sizes and strides.

    Tensors are numbered: those to be filled, what arrives for a place elsewhere, those that are sent, and the message.

    Attributes:
        num_sent, num_staged: elements of the message, and of what arrives elsewhere.
        largest: elements of the longest message of a rank.
        laid: copies to the message.
        own: copies of what stays here.
        into: for each step, where to fetch: the number of a tensor, the first element in memory, and how many.
        parts: what a receiver reads of the message of a source, where either is this rank.
        unstaged: copies of what arrived elsewhere to its place.
    """

    num_sent: int
    num_staged: int
    largest: int
    laid: Copies
    own: Copies
    into: tuple[tuple[tuple[int, int, int], ...], ...]
    parts: Mapping[tuple[int, int], tuple[slice, ...]]
    unstaged: Copies


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """Tensors on their way. `filled` are those to be filled and what arrives elsewhere: what was sent may be dropped."""

    transfer: Transfer | None
    unstaged: Copies
    filled: Sequence[Tensor]

    def finish(self) -> None:
        """Wait, on the stream, for all that is received."""
        if self.transfer is not None:
            self.transfer.wait()
        self.unstaged.make(self.filled)


class Exchange:
    """Ranks that exchange heads, and what each copies for it, planned once for all layers."""

    def __init__(self, places: Places, ring: Ring) -> None:
        """Plan nothing yet. `places`: the tokens that each rank has."""
        self._places, self._ring = places, ring
        self._counts = [sum(_size(slots) for slots, _ in runs) for runs in places]
        self._plans: dict[object, _Plan] = {}

    def send_tokens(self, tensors: Sequence[Tensor], results: Sequence[Tensor], of_rank: Heads) -> HeadExchange:
        """Start to turn all heads of local tokens into all tokens of this rank's heads.

        Args:
            tensors: `[B, heads, local tokens, D]` each.
            results: `[B, own heads or more, all tokens, D]` each, to be filled.
            of_rank: the heads that each rank gets.
        """
        return self._send(self._plan_tokens, tensors, results, of_rank)

    def send_heads(self, tensors: Sequence[Tensor], targets: Sequence[Tensor], of_rank: Heads) -> HeadExchange:
        """Start to turn all tokens of this rank's heads into all heads of local tokens: the adjoint of `send_tokens`.

        Args:
            tensors: `[B, own heads, all tokens, D]` each.
            targets: `[B, heads, local tokens, D]` each, to be filled.
            of_rank: the heads that each rank has; they do not overlap.
        """
        return self._send(self._plan_heads, tensors, targets, of_rank)

    def _send(
        self,
        plan_of: Callable[[Sequence[Tensor], Sequence[Tensor], Heads], _Plan],
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        of_rank: Heads,
    ) -> HeadExchange:
        ring = self._ring
        heads = tuple((run.start, run.stop) for own in of_rank for run in own)
        kinds, to = tuple(map(kind_of, tensors)), tuple(map(kind_of, results))
        key = plan_of.__name__, heads, kinds, to
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = plan_of([*map(like, kinds)], [*map(like, to)], of_rank)
        if ring.size == 1:
            plan.own.make((*results, results[0], *tensors))
            return HeadExchange(None, plan.unstaged, ())
        message = new_message(plan.num_sent, tensors[0], ring, plan.largest)
        filled = (*results, tensors[0].new_empty(plan.num_staged))
        held = (*filled, *tensors, message)
        plan.laid.make(held)
        steps = range(1, ring.size)
        into = [[_flat(held[number], start, numel) for number, start, numel in runs] for runs in plan.into]
        posted = post(message, ring, num_starts=len(steps))
        transfer = posted.start(steps, into, lambda receiver, source: plan.parts[receiver, source])
        plan.own.make(held)
        return HeadExchange(transfer, plan.unstaged, filled)

    def _plan_tokens(self, tensors: Sequence[Tensor], results: Sequence[Tensor], of_rank: Heads) -> _Plan:
        places, ring, counts = self._places, self._ring, self._counts
        widths, ranks = _widths(tensors, of_rank), range(ring.size)
        columns = [[of_rank[rank][index] for rank in ranks] for index in range(len(tensors))]
        laid = [[_laid_ranks(heads, source) for heads in columns] for source in ranks]
        totals = [
            counts[source] * sum(widths[rank][i] for i, of_tensor in enumerate(laid[source]) for rank in of_tensor)
            for source in ranks
        ]

        def parts(receiver: int, source: int) -> tuple[slice, ...]:
            found, start = list[slice](), 0
            for index, of_tensor in enumerate(laid[source]):
                width = widths[receiver][index]
                before = start + counts[source] * sum(widths[rank][index] for rank in of_tensor if rank < receiver)
                found += [_scaled(slots, width, before) for slots, _ in places[source] if width]
                start += counts[source] * sum(widths[rank][index] for rank in of_tensor)
            return tuple(found)

        draft = _Draft(tensors, results, totals, ring, parts)
        start = 0
        for index, (x, heads) in enumerate(zip(tensors, columns, strict=True)):
            for group in _evenly_apart([heads[rank] for rank in laid[ring.rank][index]]):
                start = draft.lay(index, _by_rank(x, group, counts[ring.rank]), start)
        for index, (x, result, own) in enumerate(zip(tensors, results, of_rank[ring.rank], strict=True)):
            mine = tokens_first(result[:, : _size(own)])
            for rank in _others(ring) if _size(own) else ():
                for _, place in places[rank]:
                    draft.fetch(rank, index, mine[place])
            for slots, place in places[ring.rank]:
                draft.keep(index, mine[place], tokens_first(x[:, own, slots]))
        return draft.plan()

    def _plan_heads(self, tensors: Sequence[Tensor], targets: Sequence[Tensor], of_rank: Heads) -> _Plan:
        places, ring, counts = self._places, self._ring, self._counts
        widths, ranks = _widths(targets, of_rank), range(ring.size)
        runs = [_laid_runs([place for _, place in places[source]], sum(counts)) for source in ranks]
        lengths = [sum(map(_size, of_source)) for of_source in runs]
        totals = [length * sum(of_source) for length, of_source in zip(lengths, widths, strict=True)]

        def parts(receiver: int, source: int) -> tuple[slice, ...]:
            found, start = list[slice](), 0
            for width in widths[source]:
                at = [_within(place, runs[source]) for _, place in places[receiver]]
                found += [_scaled(run, width, start) for run in at if width]
                start += lengths[source] * width
            return tuple(found)

        draft = _Draft(tensors, targets, totals, ring, parts)
        start = 0
        for index, x in enumerate(tensors):
            for run in runs[ring.rank]:
                start = draft.lay(index, tokens_first(x[:, :, run]), start)
        count, own = counts[ring.rank], places[ring.rank]
        for index, (x, target) in enumerate(zip(tensors, targets, strict=True)):
            heads = [of_rank[rank][index] for rank in ranks]
            arriving = _laid_ranks(heads, ring.rank)
            first = draft.stage(
                index, [_by_rank(target, g, count) for g in _evenly_apart([heads[r] for r in arriving])]
            )
            for rank in ranks:
                width, start = widths[rank][index], first + count * sum(widths[r][index] for r in arriving if r < rank)
                for slots, place in own if width else ():
                    if rank != ring.rank:
                        draft.fetch_staged(rank, _scaled(slots, width, start))
                    elif rank in arriving:
                        draft.keep_staged(index, _scaled(slots, width, start), tokens_first(x[:, :, place]))
                    else:
                        draft.keep(index, target[:, heads[rank], slots], x[:, :, place])
        return draft.plan()


class _Draft:
    """A plan in the making."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        results: Sequence[Tensor],
        totals: Sequence[int],
        ring: Ring,
        parts: Callable[[int, int], tuple[slice, ...]],
    ) -> None:
        """Plan for a rank; `totals` are the elements of the message of each."""
        self._ring, self._parts, self._totals = ring, parts, totals
        self._results, self._sent = results, [*tensors, tensors[0].new_empty(totals[ring.rank])]
        self._staging = len(results)  # its number
        self._laid: list[Pair] = []
        self._own: list[Pair] = []
        self._own_staged: list[tuple[slice, int, Tensor]] = []
        self._staged: list[tuple[int, Tensor, int]] = []
        self._num_staged = 0
        self._into: dict[int, list[tuple[int, int, int]]] = {rank: [] for rank in range(ring.size)}

    def _number(self, index: int) -> int:
        """Return the number of a tensor that is sent; the message follows the last."""
        return self._staging + 1 + index

    def lay(self, index: int, x: Tensor, start: int) -> int:
        """Lay a view of a tensor in the message and return where the next one begins."""
        end, last = start + x.numel(), len(self._sent) - 1
        self._laid.append((self._number(last), self._sent[last][start:end].view(x.shape), self._number(index), x))
        return end

    def keep(self, index: int, to: Tensor, x: Tensor) -> None:
        """Copy to a view of a result what is here."""
        self._own.append((index, to, self._number(index), x))

    def keep_staged(self, index: int, run: slice, x: Tensor) -> None:
        """Put what is here where more arrives."""
        self._own_staged.append((run, self._number(index), x))

    def fetch(self, rank: int, index: int, to: Tensor) -> None:
        """Fetch a view of a result from a rank."""
        if to.is_contiguous():
            start = int(to.storage_offset() - self._results[index].storage_offset())
            self._into[rank].append((index, start, to.numel()))
        else:
            start = self.stage(index, [to])
            self.fetch_staged(rank, slice(start, start + to.numel()))

    def fetch_staged(self, rank: int, run: slice) -> None:
        """Fetch a run of what arrives elsewhere."""
        self._into[rank].append((self._staging, run.start, _size(run)))

    def stage(self, index: int, places: Sequence[Tensor]) -> int:
        """Let views of a result arrive elsewhere, one after the other; return where they do."""
        first = self._num_staged
        for place in places:
            self._staged.append((index, place, self._num_staged))
            self._num_staged += place.numel()
        return first

    def plan(self) -> _Plan:
        """Return the plan."""
        ring, staging = self._ring, self._sent[0].new_empty(self._num_staged)
        tensors = [*self._results, staging, *self._sent]
        arrived = [(to, at, self._staging, staging[i : i + at.numel()].view(at.shape)) for to, at, i in self._staged]
        put = [(self._staging, staging[run].view(x.shape), number, x) for run, number, x in self._own_staged]
        pairs = [pair for rank in _others(ring) for pair in ((rank, ring.rank), (ring.rank, rank))]
        return _Plan(
            self._totals[ring.rank],
            self._num_staged,
            max(self._totals),
            Copies.of(self._laid, tensors),
            Copies.of([*self._own, *put], tensors),
            tuple(tuple(self._into[ring.before(step)]) for step in range(1, ring.size)),
            {pair: self._parts(*pair) for pair in pairs},
            Copies.of(arrived, tensors),
        )


def _flat(x: Tensor, start: int, numel: int) -> Tensor:
    """Return a run of the memory of a tensor, from its first element on."""
    return x.as_strided((numel,), (1,), x.storage_offset() + start)


def _others(ring: Ring) -> list[int]:
    return [rank for rank in range(ring.size) if rank != ring.rank]


def _laid_ranks(heads: Sequence[slice], rank: int) -> list[int]:
    """Return the ranks whose heads one rank lays: all others', and its own where that makes it fewer copies."""
    others = [r for r in range(len(heads)) if r != rank]
    num_copies = len(_evenly_apart([heads[r] for r in others]))
    return others if num_copies <= len(_evenly_apart(heads)) else list(range(len(heads)))


def _laid_runs(own: Sequence[slice], end: int) -> list[slice]:
    """Return the runs of tokens that a rank lays: those that are not its own, and these where that makes it one copy."""
    gaps = list(_gaps(own, end))
    return gaps if len(gaps) <= 1 else [slice(0, end)]


def _within(run: slice, runs: Sequence[slice]) -> slice:
    """Return where a run is among the slots of some runs, one of which holds it."""
    start = 0
    for held in runs:
        if held.start <= run.start < held.stop:
            return slice(start + run.start - held.start, start + run.stop - held.start)
        start += _size(held)
    raise AssertionError(f"{run} is in none of {runs}")


def _size(run: slice) -> int:
    return int(run.stop - run.start)


def _scaled(run: slice, width: int, start: int) -> slice:
    """Return the elements of a run of tokens of `width` elements each."""
    return slice(start + run.start * width, start + run.stop * width)


def _widths(tensors: Sequence[Tensor], of_rank: Heads) -> list[list[int]]:
    """Return for each rank the elements that one token has in its heads of each tensor."""
    heads = [x.shape[0] * x.shape[3] for x in tensors]
    return [[_size(own) * width for own, width in zip(rank, heads, strict=True)] for rank in of_rank]


def _gaps(runs: Sequence[slice], end: int) -> Iterator[slice]:
    """Yield what lies between some runs, from 0 to `end`."""
    start = 0
    for run in (*sorted(runs, key=lambda r: r.start), slice(end, end)):
        if start < run.start:
            yield slice(start, run.start)
        start = run.stop


def _evenly_apart(heads: Sequence[slice]) -> list[list[slice]]:
    """Return the heads of some ranks in groups of one size and one distance, without those that are empty."""
    groups: list[list[slice]] = []
    for own in heads:
        group = groups[-1] if groups else []
        distances = [b.start - a.start for a, b in pairwise([*group[-2:], own])]
        if group and _size(group[0]) == _size(own) and min(distances) > 0 and len(set(distances)) == 1:
            group.append(own)
        elif _size(own):
            groups.append([own])
    return groups


def _by_rank(x: Tensor, heads: Sequence[slice], count: int) -> Tensor:
    """Return `count` tokens of heads that are evenly apart, `[ranks, tokens, B, heads of a rank, D]`."""
    first, distance = heads[0], heads[1].start - heads[0].start if len(heads) > 1 else 1
    some = x[:, first.start : heads[-1].stop, :count]
    return some.unfold(1, _size(first), distance).permute(1, 2, 0, 4, 3)
