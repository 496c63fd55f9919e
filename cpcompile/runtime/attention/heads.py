"""Heads: which query and key heads each rank computes in Ulysses attention.

Ranks get as many query heads as can be equal, and the key heads that those read; a key head that several ranks need goes to each
of them. 3 query heads a key head, 9 heads on 2 ranks:

    rank 0: q 0 1 2 3 4, k 0 1        rank 1: q 5 6 7 8, k 1 2
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cpcompile.balance.layout import follows_documents


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of one rank: query heads [start, stop), key heads [key_start, key_stop)."""

    start: int
    stop: int
    key_start: int
    key_stop: int
    group: int

    @property
    def num_query(self) -> int:
        """The number of query heads."""
        return self.stop - self.start

    @property
    def num_key(self) -> int:
        """The number of key heads."""
        return self.key_stop - self.key_start

    def part(self, start: int, stop: int) -> Heads:
        """Return the key heads [start, stop) of these, as far as there are so many, and the query heads that read them."""
        key_start, key_stop = (min(self.key_start + at, self.key_stop) for at in (start, stop))
        first, last = (min(max(key * self.group, self.start), self.stop) for key in (key_start, key_stop))
        return Heads(first, last, key_start, key_stop, self.group)

    def key_index(self) -> list[int] | None:
        """Return the local key head of each local query head, or None when kernels find it themselves, as h // (H / K)."""
        index = [head // self.group - self.key_start for head in range(self.start, self.stop)]
        uniform = self.num_key > 0 and self.num_query % self.num_key == 0
        if not index or (uniform and index == [i // (self.num_query // self.num_key) for i in range(self.num_query)]):
            return None
        return index


def heads_of(rank: int, world_size: int, num_query: int, num_key: int) -> Heads:
    """Return the heads of `rank`."""
    num_query, num_key = int(num_query), int(num_key)  # as in `heads_of_ranks`
    share, extra = divmod(num_query, world_size)
    start = rank * share + min(rank, extra)
    stop = start + share + (rank < extra)
    group = num_query // num_key
    key_start = start // group
    key_stop = (stop - 1) // group + 1 if stop > start else key_start
    return Heads(start, stop, key_start, key_stop, group)


Ranks = tuple[Heads, ...]  # the heads of each rank


def heads_of_ranks(world_size: int, num_query: int, num_key: int) -> Ranks:
    """Return the heads of each rank."""
    # Head counts are properties of the model: a symbolic one becomes a constant of the graph here.
    return _heads_of_ranks(world_size, int(num_query), int(num_key))


@lru_cache(maxsize=256)
def _heads_of_ranks(world_size: int, num_query: int, num_key: int) -> Ranks:
    return tuple(heads_of(rank, world_size, num_query, num_key) for rank in range(world_size))


NUM_ROUNDS = 2


def rounds(
    world_size: int, num_query: int, num_key: int, most: int = NUM_ROUNDS, at_once: int = 0
) -> tuple[Ranks, ...]:
    """Return the heads of each rank in `most` rounds, if each has as many whole groups of heads in all, or else in one.

    With `at_once`: in as many rounds as it takes for no rank to have more key heads than that in one.
    """
    return _rounds(heads_of_ranks(world_size, num_query, num_key), most, at_once)


@lru_cache(maxsize=256)
def _rounds(ranks: Ranks, most: int, at_once: int) -> tuple[Ranks, ...]:
    own = {rank.num_key for rank in ranks}
    if at_once:
        return tuple(tuple(rank.part(i, i + at_once) for rank in ranks) for i in range(0, max(own), at_once))
    is_even = len(own) == 1 and all(rank.num_query == rank.num_key * rank.group for rank in ranks)
    size = own.pop() // most if is_even else 0
    if len(ranks) == 1 or not size or size * most != ranks[0].num_key:
        return (ranks,)
    return tuple(tuple(rank.part(i * size, (i + 1) * size) for rank in ranks) for i in range(most))


def most_rounds(layout: str, is_ring: bool) -> int:
    """Return in how many rounds heads are exchanged, if they divide: a ring of documents has many small kernels already."""
    return 1 if is_ring and follows_documents(layout) else NUM_ROUNDS


def storage(world_size: int, num_query: int, num_key: int) -> tuple[int, int]:
    """Return the most query and key heads that any rank has: the sizes that all ranks allocate, so that shapes agree."""
    ranks = heads_of_ranks(world_size, num_query, num_key)
    return max(rank.num_query for rank in ranks), max(rank.num_key for rank in ranks)
