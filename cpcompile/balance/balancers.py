"""Balancers: which rank holds which tokens.

A balancer maps (length, number of ranks, boundaries of documents) to a `Sharding`. The pictures show 8 tokens on 2 ranks and
the pairs of query and key that each rank computes: causal, of one document unless the picture has a bar between two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cpcompile.balance.documents import Boundaries, Documents
from cpcompile.balance.layout import chunk_length, local_length, num_chunks, rank_chunks
from cpcompile.balance.sharding import Sharding
from cpcompile.errors import ConfigError

BATCH = 1 << 20  # runs made at once: thousands of documents times thousands of ranks would not fit


@dataclass(frozen=True, slots=True)
class Balancer(ABC):
    """Base of all balancers."""

    by_heads: ClassVar[bool] = False  # whether attention is computed by heads rather than by the rows that a rank holds

    def shard(self, length: int, world_size: int, cu_seqlens: Boundaries | None = None) -> Sharding:
        """Return which rank holds which of `length` tokens.

        Args:
            length: tokens of the sequence.
            world_size: ranks that share it.
            cu_seqlens: 0 and the end of each document, so that the last is `length`; None is one document.

        Raises:
            ConfigError: there is no rank.
            InputError: there is no token, or the boundaries do not go from 0 to `length` without going back.
        """
        return self.shard_documents(Documents.of(length, cu_seqlens), world_size)

    def shard_documents(self, documents: Documents, world_size: int) -> Sharding:
        """Return which rank holds which token. All rows of a batch are sharded alike, for the work of them together.

        Raises:
            ConfigError: there is no rank.
        """
        if world_size < 1:
            raise ConfigError(f"a sequence cannot be sharded over {world_size} ranks: pass at least one")
        return self._shard(documents, world_size)

    @abstractmethod
    def _shard(self, documents: Documents, world_size: int) -> Sharding: ...


@dataclass(frozen=True, slots=True)
class Contiguous(Balancer):
    """One run for each rank; the last ranks hold less where P does not divide. The layout `contiguous`.

    rank 0: 0 1 2 3 (10 pairs)   rank 1: 4 5 6 7 (26 pairs)
    """

    def _shard(self, documents: Documents, world_size: int) -> Sharding:
        return of_layout(documents.length, world_size, "contiguous")


@dataclass(frozen=True, slots=True)
class Llama3(Contiguous):
    """One run for each rank, whose rows attend to one gathered slice of keys: `Llama3Bounds` has it.

    rank 0: 0 1 2 3 (10 pairs)   rank 1: 4 5 6 7 (26 pairs)

    Named as in ring-flash-attention. (What the Llama 3 paper, arXiv:2407.21783, describes is `ZigZag` with gathered keys.)
    """


@dataclass(frozen=True, slots=True)
class Ulysses(Contiguous):
    """One run for each rank outside attention, all tokens of some heads inside (DeepSpeed-Ulysses, arXiv:2309.14509).

    rank 0: 0 1 2 3, half of the heads (18 pairs)   rank 1: 4 5 6 7, the other half (18 pairs)
    """

    by_heads: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ZigZag(Balancer):
    """Two runs for each rank, one from either end. The layout `zig_zag`; equal work for one document.

    rank 0: 0 1 6 7 (18 pairs)   rank 1: 2 3 4 5 (18 pairs)
    """

    def _shard(self, documents: Documents, world_size: int) -> Sharding:
        return of_layout(documents.length, world_size, "zig_zag")


@dataclass(frozen=True, slots=True)
class ZigZagByDocument(Balancer):
    """Two runs of each document for each rank, without padding: what a document leaves over goes to the next ranks in turn.

    rank 0: 0 3 | 4 7 (10 pairs)   rank 1: 1 2 | 5 6 (10 pairs)

    Equal tokens within one. Equal work where documents have many tokens for each rank; each rank needs nearly all keys.
    """

    def _shard(self, documents: Documents, world_size: int) -> Sharding:
        starts = documents.cuts
        ends = torch.cat([starts[1:], torch.tensor([documents.length])])
        batch = max(1, BATCH // world_size)
        parts = [
            _zig_zag_runs(starts[i : i + batch], ends[i : i + batch], world_size) for i in range(0, len(ends), batch)
        ]
        sizes, ranks = (torch.cat(part) for part in zip(*parts, strict=True))
        return Sharding.of(sizes, ranks, world_size, -(-documents.length // world_size))


@dataclass(frozen=True, slots=True)
class Striped(Balancer):
    """Tokens are dealt one by one (striped attention, arXiv:2311.09431). Runs have one token.

    rank 0: 0 2 4 6 (16 pairs)   rank 1: 1 3 5 7 (20 pairs)
    """

    def _shard(self, documents: Documents, world_size: int) -> Sharding:
        length = documents.length
        ranks = torch.arange(length) % world_size
        return Sharding.of(torch.ones_like(ranks), ranks, world_size, -(-length // world_size))


def of_layout(length: int, world_size: int, layout: str) -> Sharding:
    """Return the sharding of a layout of `cpcompile.balance.layout`."""
    cuts = torch.arange(num_chunks(world_size, layout) + 1) * chunk_length(length, world_size, layout)
    ranks = torch.empty(len(cuts) - 1, dtype=torch.long)
    for rank in range(world_size):
        ranks[list(rank_chunks(rank, world_size, layout))] = rank
    return Sharding.of(cuts.clamp(max=length).diff(), ranks, world_size, local_length(length, world_size, layout))


def _zig_zag_runs(starts: Tensor, ends: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Return sizes and ranks of the runs of these documents, [R] each, in the order of the sequence."""
    ranks = torch.arange(world_size)
    # As if tokens were dealt one by one, so that ranks are level at every boundary.
    before, after = ((bound[:, None] + world_size - 1 - ranks) // world_size for bound in (starts, ends))
    held = after - before
    # The odd token is an early one in one document and a late one in the next, or the last ranks would have more work.
    low = (held + torch.arange(len(starts))[:, None] % 2) // 2
    sizes = torch.cat([low, (held - low).flip(1)], dim=1).flatten()
    holders = torch.cat([ranks, ranks.flip(0)]).repeat(len(starts))
    return sizes[sizes > 0], holders[sizes > 0]
