"""Simulate: what each rank holds, computes and needs under a balancer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.balance.balanced import work
from cpcompile.balance.balancers import Balancer
from cpcompile.balance.documents import Boundaries, Documents
from cpcompile.balance.sharding import Sharding, sum_by_rank


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of an attention layer; bytes are those of one number."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    bytes_per_number: int = 2


@dataclass(frozen=True, slots=True, eq=False)
class Load:
    """What each rank has to do in one attention layer, forward.

    Attributes:
        tokens: that it holds, int64 [P].
        area: pairs of query and key that it computes, as parts of all heads, float64 [P].
        key_bytes: of keys and values that other ranks hold and its rows see, int64 [P].
        runs: of consecutive tokens, int64 [P].
    """

    tokens: Tensor
    area: Tensor
    key_bytes: Tensor
    runs: Tensor

    @property
    def token_imbalance(self) -> float:
        """Tokens of the fullest rank over the mean."""
        return float(self.tokens.max() / self.tokens.double().mean())

    @property
    def area_imbalance(self) -> float:
        """Work of the busiest rank over the mean: 1 is ideal."""
        return float(self.area.max() / self.area.mean())


def simulate(
    balancer: Balancer,
    length: int,
    world_size: int,
    cu_seqlens: Boundaries | None = None,
    heads: Heads | None = None,
) -> Load:
    """Return what each rank has to do for causal attention within documents.

    Arguments and errors are those of `Balancer.shard`; `heads` are by default 32 query and 8 key heads of 128 in bfloat16.
    """
    heads = heads or Heads()
    sharding = balancer.shard(length, world_size, cu_seqlens)
    documents = Documents.of(length, cu_seqlens)
    runs = sum_by_rank(torch.ones_like(sharding.ranks), sharding.ranks, world_size)
    if balancer.by_heads:
        area, kv_heads = _by_heads(documents, world_size, heads)
        keys = (length - sharding.tokens) * kv_heads
    else:
        area = work(documents, sharding).double()
        keys = _keys_needed(documents, sharding) * heads.num_kv_heads
    return Load(sharding.tokens, area, keys * 2 * heads.head_dim * heads.bytes_per_number, runs)


def _by_heads(documents: Documents, world_size: int, heads: Heads) -> tuple[Tensor, Tensor]:
    """Return the area and the number of key heads of each rank."""
    first = torch.arange(world_size + 1) * heads.num_heads // world_size
    num_heads, group = first.diff(), heads.num_heads // heads.num_kv_heads
    kv_heads = -(-first[1:] // group) - first[:-1] // group
    return documents.area * num_heads.double() / heads.num_heads, torch.where(num_heads > 0, kv_heads, 0)


def _keys_needed(documents: Documents, sharding: Sharding) -> Tensor:
    """Return how many tokens of other ranks the rows of each rank see, int64 [P]."""
    by_rank = sharding.ranks.argsort(stable=True)
    ranks, starts, sizes = (x[by_rank] for x in (sharding.ranks, sharding.starts, sharding.sizes))
    ends = starts + sizes
    # A run sees from where its first document begins to its own end. Both ascend within a rank.
    is_first = torch.cat([torch.tensor([True]), ranks.diff() != 0])
    seen_before = torch.where(is_first, 0, ends.roll(1))
    seen = ends - torch.maximum(documents.start_of(starts), seen_before)
    return sum_by_rank(seen - sizes, ranks, sharding.world_size)


def one(length: int, generator: torch.Generator) -> Tensor:
    """One document."""
    return torch.tensor([0, length])


def log_normal(length: int, generator: torch.Generator) -> Tensor:
    """Log-normal lengths with median 1000 and sigma 1.2: nine in ten between 140 and 7200 tokens, mean 2050."""
    return _packed(length, 1000, 1.2, generator)


def giant(length: int, generator: torch.Generator) -> Tensor:
    """One document of 60% of the tokens, log-normal ones before and after."""
    before, size = length * 15 // 100, length * 60 // 100
    around = log_normal(length - size, generator)
    head = around[around < before]
    return torch.cat([head, torch.tensor([before]), around[around > before] + size])


def tiny(length: int, generator: torch.Generator) -> Tensor:
    """Log-normal lengths with median 50 and sigma 0.7."""
    return _packed(length, 50, 0.7, generator)


MIXES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    draw.__name__: draw for draw in (one, giant, log_normal, tiny)
}


def _packed(length: int, median: float, sigma: float, generator: torch.Generator) -> Tensor:
    """Return boundaries of documents of random lengths, the last one cut."""
    bounds = torch.zeros(1, dtype=torch.long)
    while bounds[-1] < length:
        drawn = (torch.randn(1024, generator=generator) * sigma).exp() * median
        bounds = torch.cat([bounds, bounds[-1] + drawn.long().clamp(min=1).cumsum(0)])
    return torch.cat([bounds[bounds < length], torch.tensor([length])])
