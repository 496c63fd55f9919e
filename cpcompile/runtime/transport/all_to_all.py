"""All to all: tokens become heads or heads become tokens: every rank sends to every other, while something else is computed.

A message holds one tensor after the other. Of local tokens, what goes to each rank follows in turn, tokens first: ranks whose
heads are evenly apart are laid by one copy. Of heads, the tokens of the other ranks follow in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from cpcompile.runtime.transport.messages import copy_, lay, tokens_first
from cpcompile.runtime.transport.post import Parts, Ring, Transfer, new_message, post

Tensor = torch.Tensor
Heads = Sequence[Sequence[slice]]  # for each rank, its heads of each tensor
Places = Sequence[Sequence[tuple[slice, slice]]]  # for each rank, runs of its slots and where they are among all tokens


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """Tensors on their way; `staged` are pairs of a place and what arrives for it elsewhere."""

    transfer: Transfer | None
    staged: Sequence[tuple[Tensor, Tensor]]

    def finish(self) -> None:
        """Wait, on the stream, for all that is received."""
        if self.transfer is not None:
            self.transfer.wait()
        for to, x in self.staged:
            copy_(to, x)


def send_tokens(
    tensors: Sequence[Tensor], results: Sequence[Tensor], of_rank: Heads, places: Places, ring: Ring
) -> HeadExchange:
    """Start to turn all heads of local tokens into all tokens of this rank's heads.

    Args:
        tensors: `[B, heads, local tokens, D]` each.
        results: `[B, own heads or more, all tokens, D]` each, to be filled.
        of_rank: the heads that each rank gets.
        places: the tokens that each rank has.
        ring: the ranks.
    """
    widths, counts = _widths(tensors, of_rank), _counts(places)
    ranks, others = range(ring.size), _others(ring)

    def parts(receiver: int, source: int) -> list[slice]:
        found, start = [], 0
        for index, width in enumerate(widths[receiver]):
            before = start + counts[source] * sum(widths[rank][index] for rank in ranks[:receiver] if rank != source)
            found += [_scaled(slots, width, before) for slots, _ in places[source] if width]
            start += counts[source] * sum(widths[rank][index] for rank in ranks if rank != source)
        return found

    def lay_all(message: Tensor) -> None:
        start = 0
        for index, x in enumerate(tensors):
            for group in _evenly_apart([of_rank[rank][index] for rank in others]):
                start = lay(_by_rank(x, group, counts[ring.rank]), message, start)

    into: list[list[Tensor]] = [[] for _ in ranks]
    staged: list[tuple[Tensor, Tensor]] = []
    for x, result, heads in zip(tensors, results, of_rank[ring.rank], strict=True):
        mine = tokens_first(result[:, : _size(heads)])
        for rank in others if _size(heads) else ():
            for _, place in places[rank]:
                to = mine[place]
                into[rank].append(to if to.is_contiguous() else to.new_empty(to.shape))
                if into[rank][-1] is not to:
                    staged.append((to, into[rank][-1]))
        for slots, place in places[ring.rank]:
            copy_(mine[place], tokens_first(x[:, heads, slots]))
    totals = [count * sum(sum(widths[rank]) for rank in ranks if rank != source) for source, count in enumerate(counts)]
    return _start(tensors[0], totals, lay_all, into, parts, staged, ring)


def send_heads(
    tensors: Sequence[Tensor], targets: Sequence[Tensor], of_rank: Heads, places: Places, ring: Ring
) -> HeadExchange:
    """Start to turn all tokens of this rank's heads into all heads of local tokens: the adjoint of `send_tokens`.

    Args:
        tensors: `[B, own heads, all tokens, D]` each.
        targets: `[B, heads, local tokens, D]` each, to be filled.
        of_rank: the heads that each rank has; they do not overlap.
        places: the tokens that each rank gets.
        ring: the ranks.
    """
    widths, counts = _widths(targets, of_rank), _counts(places)
    own, others = places[ring.rank], _others(ring)

    def parts(receiver: int, source: int) -> list[slice]:
        found, start = [], 0
        for width in widths[source]:
            for _, place in places[receiver]:
                skipped = sum(_size(other) for _, other in places[source] if other.start < place.start)
                found += [_scaled(place, width, start - skipped * width)] if width else []
            start += (sum(counts) - counts[source]) * width
        return found

    def lay_all(message: Tensor) -> None:
        start = 0
        for x in tensors:
            for run in _gaps([place for _, place in own], sum(counts)):
                start = lay(tokens_first(x[:, :, run]), message, start)

    into: list[list[Tensor]] = [[] for _ in range(ring.size)]
    staged: list[tuple[Tensor, Tensor]] = []
    count = counts[ring.rank]
    for index, (x, target) in enumerate(zip(tensors, targets, strict=True)):
        arriving, start = x.new_empty(count * sum(widths[rank][index] for rank in others)), 0
        for group in _evenly_apart([of_rank[rank][index] for rank in others]):
            to = _by_rank(target, group, count)
            staged.append((to, arriving[start : start + to.numel()].view(to.shape)))
            start += to.numel()
        start = 0
        for rank in others:
            width = widths[rank][index]
            into[rank] += [arriving[_scaled(slots, width, start)] for slots, _ in own if width]
            start += count * width
        for slots, place in own:
            copy_(target[:, of_rank[ring.rank][index], slots], x[:, :, place])
    totals = [(sum(counts) - count) * sum(of_source) for count, of_source in zip(counts, widths, strict=True)]
    return _start(tensors[0], totals, lay_all, into, parts, staged, ring)


def _start(
    like: Tensor,
    totals: Sequence[int],
    lay_all: Callable[[Tensor], None],
    into: Sequence[Sequence[Tensor]],
    parts: Parts,
    staged: Sequence[tuple[Tensor, Tensor]],
    ring: Ring,
) -> HeadExchange:
    """Lay a message and start fetching those of the others; `totals` are the elements of the message of each rank."""
    if ring.size == 1:
        return HeadExchange(None, staged)
    message = new_message(totals[ring.rank], like, ring, max(totals))
    lay_all(message)
    steps = range(1, ring.size)
    posted = post(message, ring, num_starts=len(steps))
    return HeadExchange(posted.start(steps, [into[ring.before(step)] for step in steps], parts), staged)


def _others(ring: Ring) -> list[int]:
    return [rank for rank in range(ring.size) if rank != ring.rank]


def _size(run: slice) -> int:
    return int(run.stop - run.start)


def _scaled(run: slice, width: int, start: int) -> slice:
    """Return the elements of a run of tokens of `width` elements each."""
    return slice(start + run.start * width, start + run.stop * width)


def _widths(tensors: Sequence[Tensor], of_rank: Heads) -> list[list[int]]:
    """Return for each rank the elements that one token has in its heads of each tensor."""
    heads = [x.shape[0] * x.shape[3] for x in tensors]
    return [[_size(own) * width for own, width in zip(rank, heads, strict=True)] for rank in of_rank]


def _counts(places: Places) -> list[int]:
    """Return the tokens of each rank."""
    return [sum(_size(slots) for slots, _ in runs) for runs in places]


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
