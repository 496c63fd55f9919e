"""Which tokens each rank holds, for axolotl's ring attention functions; tokens to the ranks and back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch

from cpcompile.balance.token_spans import Spans
from cpcompile.compat._ring_layouts import contiguous, zig_zag
from cpcompile.runtime.transport import process_group
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor


class RingAttnFunc(str, Enum):
    """How the ranks share a sequence, by axolotl's names. 8 tokens on 2 ranks:

    VARLEN_LLAMA3   rank 0: 0 1 2 3   rank 1: 4 5 6 7   keys are gathered, some heads at a time
    BATCH_RING      rank 0: 0 1 2 3   rank 1: 4 5 6 7   keys come round a ring, as in the next two
    BATCH_ZIGZAG    rank 0: 0 1 6 7   rank 1: 2 3 4 5
    BATCH_STRIPE    rank 0: 0 2 4 6   rank 1: 1 3 5 7
    """

    VARLEN_LLAMA3 = "varlen_llama3"
    BATCH_RING = "batch_ring"
    BATCH_ZIGZAG = "batch_zigzag"
    BATCH_STRIPE = "batch_stripe"


@dataclass(frozen=True, slots=True)
class Shards:
    """A sequence on ranks.

    Attributes:
        function: decides which tokens a rank holds.
        num_slots: tokens of a rank, padding included, which is at the end of the sequence.
        num_ranks: that share the sequence.
        length: tokens of the sequence, without padding.
    """

    function: RingAttnFunc
    num_slots: int
    num_ranks: int
    length: int

    @classmethod
    def of(cls, function: RingAttnFunc, length: int, num_ranks: int) -> Shards:
        """Return the shards of `length` tokens, with as little padding as the layout needs."""
        chunks_of_rank = 2 if function is RingAttnFunc.BATCH_ZIGZAG else 1
        chunk = -(-length // (chunks_of_rank * num_ranks))
        return cls(function, chunk * chunks_of_rank, num_ranks, length)

    @property
    def padding(self) -> int:
        """How many slots hold no token, on all ranks."""
        return self.num_ranks * self.num_slots - self.length

    @property
    def spans(self) -> tuple[Spans, ...]:
        """The tokens of each rank when it attends: stripes have been exchanged for the zig-zag layout by then."""
        return _spans(self)

    def positions(self, rank: int) -> Tensor:
        """Return the position of each slot of a rank, int64 `[num_slots]`; those of padding are `length` and more."""
        return _positions(self, rank)

    def shard(self, x: Tensor, dim: int, rank: int, fill: float = 0) -> Tensor:
        """Return a rank's tokens of `x`, with `fill` in slots of padding."""
        pads = [0, 0] * (x.dim() - dim - 1) + [0, self.padding]
        padded = torch.nn.functional.pad(x, pads, value=fill) if self.padding else x
        return padded.index_select(dim, self.positions(rank).to(x.device))

    def join(self, stacked: Tensor, dim: int) -> Tensor:
        """Return the tokens of all ranks in their order, from `[num_ranks, ...]` with the tokens of `x[r]` in `dim`."""
        laid = stacked.movedim(0, dim).flatten(dim, dim + 1)
        return laid.index_select(dim, _order(self).to(stacked.device)[: self.length])

    def split(self, x: Tensor, dim: int) -> Tensor:
        """Return the inverse of `join`, 0 in slots of padding."""
        shape = [*x.shape[:dim], self.num_ranks * self.num_slots, *x.shape[dim + 1 :]]
        laid = x.new_zeros(shape).index_copy_(dim, _order(self).to(x.device)[: self.length], x)
        return torch.unflatten(laid, dim, (self.num_ranks, self.num_slots)).movedim(dim, 0)


@lru_cache(maxsize=64)
def _spans(shards: Shards) -> tuple[Spans, ...]:
    is_contiguous = shards.function in (RingAttnFunc.VARLEN_LLAMA3, RingAttnFunc.BATCH_RING)
    ranks = (contiguous if is_contiguous else zig_zag)(shards.num_slots, shards.num_ranks)
    held = (tuple(span.between(0, shards.length) for span in spans) for spans in ranks)
    return tuple(tuple(span for span in spans if span.size) for spans in held)


@lru_cache(maxsize=64)
def _positions(shards: Shards, rank: int) -> Tensor:
    if shards.function is RingAttnFunc.BATCH_STRIPE:
        return torch.arange(shards.num_slots) * shards.num_ranks + rank
    spans = _spans(Shards(shards.function, shards.num_slots, shards.num_ranks, shards.num_ranks * shards.num_slots))
    return torch.cat([torch.arange(span.position, span.end) for span in spans[rank]])


@lru_cache(maxsize=16)
def _order(shards: Shards) -> Tensor:
    """Return, for each token, its slot in those of all ranks laid end to end."""
    return torch.argsort(torch.cat([shards.positions(rank) for rank in range(shards.num_ranks)]))


def gather(x: Tensor, shards: Shards, ring: Ring, dim: int = 1) -> Tensor:
    """Return the tokens of all ranks in their order, without padding. The gradient is summed over the ranks."""
    found: Tensor = _Gather.apply(x, shards, ring, dim)  # type: ignore[no-untyped-call]
    return found


class _Gather(torch.autograd.Function):
    """This rank's tokens -> those of all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards, ring: Ring, dim: int) -> Tensor:
        ctx.settings = shards, ring, dim
        return shards.join(process_group.all_gather(x, ring.size, ring.group), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shards, ring, dim = ctx.settings
        return process_group.reduce_scatter(shards.split(grad, dim), ring.size, ring.group), None, None, None


def mean_over_ranks(x: Tensor, ring: Ring) -> Tensor:
    """Return the mean of `x` over the ranks. Gradients are averaged over them later, so that here they pass unchanged."""
    found: Tensor = _Mean.apply(x, ring)  # type: ignore[no-untyped-call]
    return found


class _Mean(torch.autograd.Function):
    """x -> its mean over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ring: Ring) -> Tensor:
        return process_group.all_reduce(x, ring.size, ring.group) / ring.size

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
