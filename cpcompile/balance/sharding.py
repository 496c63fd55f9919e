"""Sharding: which tokens each rank holds, as runs of the sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.balance.token_spans import Span


@dataclass(frozen=True, slots=True, eq=False)
class Sharding:
    """The sequence cut into runs, each held by one rank. A rank holds its runs in the order of their positions.

    All ranks have `local_length` slots. Those after a rank's tokens are padding, and their positions are >= `length`.

    Attributes:
        length: tokens of the sequence.
        world_size: ranks.
        local_length: token slots of each rank.
        sizes: tokens of each run, in the order of the sequence, int64 [R], none 0.
        ranks: who holds each run, int64 [R]; neighbours differ.
    """

    length: int
    world_size: int
    local_length: int
    sizes: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, sizes: Tensor, ranks: Tensor, world_size: int, local_length: int | None = None) -> Sharding:
        """Return the sharding with these runs; empty ones are left out and neighbours on one rank joined.

        `local_length` is by default what the fullest rank holds.
        """
        ranks, sizes = ranks[sizes > 0], sizes[sizes > 0]
        is_last = torch.cat([ranks.diff() != 0, torch.tensor([True])])
        ends, ranks = sizes.cumsum(0)[is_last], ranks[is_last]
        sizes = ends.diff(prepend=torch.tensor([0]))
        if local_length is None:
            local_length = int(sum_by_rank(sizes, ranks, world_size).max())
        return cls(int(ends[-1]), world_size, local_length, sizes, ranks)

    @property
    def starts(self) -> Tensor:
        """The position of the first token of each run, int64 [R]."""
        return self.sizes.cumsum(0) - self.sizes

    @property
    def tokens(self) -> Tensor:
        """How many tokens each rank holds, int64 [P]."""
        return sum_by_rank(self.sizes, self.ranks, self.world_size)

    @property
    def padding(self) -> Tensor:
        """How many slots at the end of each rank hold no token, int64 [P]."""
        return self.local_length - self.tokens

    @property
    def slots(self) -> Tensor:
        """The slot of the first token of each run, on its rank, int64 [R]."""
        by_rank = self.ranks.argsort(stable=True)
        sizes, tokens = self.sizes[by_rank], self.tokens
        slots = torch.empty_like(by_rank)
        slots[by_rank] = sizes.cumsum(0) - sizes - (tokens.cumsum(0) - tokens)[self.ranks[by_rank]]
        return slots

    def split(self, parts: int, local_length: int) -> Sharding:
        """Return the sharding in which `parts` ranks of `local_length` slots, one after the other, share what each rank holds."""
        slots, ends = self.slots, self.slots + self.sizes
        first = slots // local_length
        counts = (ends - 1) // local_length - first + 1
        run = torch.repeat_interleave(counts)
        part = torch.arange(len(run)) - (counts.cumsum(0) - counts - first)[run]
        sizes = ends[run].minimum((part + 1) * local_length) - slots[run].maximum(part * local_length)
        return Sharding.of(sizes, self.ranks[run] * parts + part, self.world_size * parts, local_length)

    def spans(self, rank: int) -> tuple[Span, ...]:
        """Return the runs of `rank`, in order of position and without padding."""
        mine = self.ranks == rank
        sizes, starts = self.sizes[mine], self.starts[mine]
        slots = sizes.cumsum(0) - sizes
        return tuple(map(Span, slots.tolist(), starts.tolist(), sizes.tolist()))

    def inverse(self) -> Tensor:
        """Return, for each token of the sequence, its slot in the ranks' slots laid end to end, int64 [length]."""
        firsts = self.ranks * self.local_length + self.slots
        return torch.arange(self.length) + torch.repeat_interleave(firsts - self.starts, self.sizes)

    def order(self) -> Tensor:
        """Return the position in each slot of the ranks laid end to end, int64 [P * local_length]: a permutation."""
        slots = torch.full((self.world_size * self.local_length,), -1)
        slots[self.inverse()] = torch.arange(self.length)
        slots[slots < 0] = torch.arange(self.length, len(slots))
        return slots


def sum_by_rank(values: Tensor, ranks: Tensor, world_size: int) -> Tensor:
    """Return the sum of the values of each rank's runs, [P] in the dtype of `values`."""
    return torch.zeros(world_size, dtype=values.dtype).index_add(0, ranks, values)
