"""Balanced: equal tokens and nearly equal attention for any mix of documents, with few runs for each rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.balance.balancers import Balancer
from cpcompile.balance.documents import Documents
from cpcompile.balance.sharding import Sharding, sum_by_rank


@dataclass(frozen=True, slots=True)
class Balanced(Balancer):
    """Chunks of equal length; the heaviest that is left goes to the rank with the least work that is not full.

    rank 0: 0 1 2 5 (12 pairs)   rank 1: 3 4 | 6 7 (12 pairs)

    A rank is full with `rounds` chunks, which fill its slots, so that no document is padded: what P does not divide is missing
    at the end of the sequence. `rounds` grows from 1, by a quarter from 4 on, until the busiest rank has at most `tolerance`
    more work than the mean; where none gets there, the most even is taken. One round is `Contiguous`, two of one long document
    are `ZigZag`: as few and long runs as the work allows.

    Ours. The rule is Graham's longest processing time first, with the limit of balanced k-partitioning (Babel, Kellerer and
    Kotov 1998); torch's per-block (PTRR) balancer sorts blocks of a given size and deals them back and forth.
    """

    tolerance: float = 0.02

    def _shard(self, documents: Documents, world_size: int) -> Sharding:
        best, least = None, float("inf")
        for sharding in _candidates(documents, world_size):
            excess = work(documents, sharding).max().item() * world_size / documents.area - 1
            if excess < least:
                best, least = sharding, excess
            if excess <= self.tolerance:
                break
        assert best is not None
        return best


def work(documents: Documents, sharding: Sharding) -> Tensor:
    """Return the pairs of query and key of each rank's tokens, int64 [P]."""
    starts = sharding.starts
    areas = documents.area_until(starts + sharding.sizes) - documents.area_until(starts)
    return sum_by_rank(areas, sharding.ranks, sharding.world_size)


def _candidates(documents: Documents, world_size: int) -> Iterator[Sharding]:
    """Yield shardings of ever smaller chunks, with tokens equal within one chunk."""
    rounds = 1
    while rounds == 1 or rounds * world_size <= documents.length:
        sharding = _deal(documents, world_size, rounds)
        tokens = sharding.tokens
        if int(tokens.max() - tokens.min()) <= -(-documents.length // (rounds * world_size)):
            yield sharding
        rounds += max(1, (1 << rounds.bit_length()) // 8)


def _deal(documents: Documents, world_size: int, rounds: int) -> Sharding:
    chunks, slots = rounds * world_size, -(-documents.length // world_size)
    cuts = torch.arange(chunks + 1) * (slots * world_size) // chunks
    is_long = cuts.diff() > slots // rounds  # by one token: a rank holds so many of either that they fill its slots
    cuts = cuts.clamp(max=documents.length)
    areas = documents.area_until(cuts).diff()
    room = {length: [num] * world_size for length, num in ((True, slots % rounds), (False, rounds - slots % rounds))}
    lightest = {
        length: [(0, rank) for rank in range(world_size)] for length in room
    }  # heaps, also of what was true before
    work_of, rank_of, area_of, kind_of = [0] * world_size, [0] * chunks, areas.tolist(), is_long.tolist()
    for chunk in areas.argsort(descending=True, stable=True).tolist():
        kind = kind_of[chunk]
        rank = _pop_lightest(lightest[kind], work_of, room[kind])
        rank_of[chunk] = rank
        room[kind][rank] -= 1
        work_of[rank] += area_of[chunk]
        for length, heap in lightest.items():
            if room[length][rank]:
                heapq.heappush(heap, (work_of[rank], rank))
    return Sharding.of(cuts.diff(), _in_order(torch.tensor(rank_of), world_size), world_size, slots)


def _pop_lightest(heap: list[tuple[int, int]], work_of: list[int], room: list[int]) -> int:
    """Return the rank with the least work that has room."""
    while True:
        area, rank = heapq.heappop(heap)
        if area == work_of[rank] and room[rank]:
            return rank


def _in_order(ranks: Tensor, world_size: int) -> Tensor:
    """Return the same runs with the ranks named in the order of their first runs."""
    runs = torch.arange(len(ranks))
    first = torch.full((world_size,), len(ranks)).scatter_reduce(0, ranks, runs, "amin")
    return first.argsort().argsort()[ranks]
