"""Stripes: tokens of rank r are r, r + P, r + 2P, ...; one exchange brings them to runs of tokens, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from cpcompile.compat._ring_layouts import zig_zag
from cpcompile.runtime.transport import process_group
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """A permutation of tokens between ranks, as one of them sees it; both ways are to and from the other ranks in their order.

    Attributes:
        slots: the own slots in the order in which their tokens go to the ranks.
        counts: how many tokens go to each rank.
        other_slots, other_counts: the same of the other side of the permutation.
        ring: the ranks.
    """

    slots: Tensor
    counts: tuple[int, ...]
    other_slots: Tensor
    other_counts: tuple[int, ...]
    ring: Ring

    @property
    def back(self) -> Way:
        """The inverse."""
        return Way(self.other_slots, self.other_counts, self.slots, self.counts, self.ring)


@lru_cache(maxsize=16)
def from_stripes(size: int, ring: Ring, device: torch.device) -> Way:
    """Return the way from stripes to the zig-zag layout, for `size` tokens a rank."""
    position = torch.arange(size) * ring.size + ring.rank
    spans = zig_zag(size, ring.size)
    runs = sorted((span.position, rank) for rank, of_rank in enumerate(spans) for span in of_rank)
    begins, ranks = torch.tensor([run[0] for run in runs]), torch.tensor([run[1] for run in runs])
    receiver = ranks[torch.bucketize(position, begins, right=True) - 1]
    held = torch.cat([torch.arange(span.position, span.end) for span in spans[ring.rank]])
    source = held % ring.size
    slots, other = (torch.argsort(x, stable=True).to(device) for x in (receiver, source))
    counts, other_counts = (tuple(torch.bincount(x, minlength=ring.size).tolist()) for x in (receiver, source))
    return Way(slots, counts, other, other_counts, ring)


def exchange(tensors: Sequence[Tensor], way: Way) -> list[Tensor]:
    """Return tensors `[B, heads, tokens, D]` of one dtype with the tokens that the ranks send; differentiable."""
    tokens_first = [x.permute(2, 0, 1, 3) for x in tensors]
    moved = _Exchange.apply(torch.cat([x.flatten(1) for x in tokens_first], 1), way)  # type: ignore[no-untyped-call]
    parts = torch.split(moved, [x.shape[1:].numel() for x in tokens_first], 1)
    return [part.reshape(x.shape).permute(1, 2, 0, 3) for part, x in zip(parts, tokens_first, strict=True)]


def _exchanged(x: Tensor, way: Way) -> Tensor:
    width, ring = x.shape[1], way.ring
    messages = [part.flatten() for part in torch.split(x[way.slots], list(way.counts))]
    received = process_group.all_to_all(messages, [n * width for n in way.other_counts], ring.size, ring.group)
    return torch.empty_like(x).index_copy_(0, way.other_slots, torch.cat(received).view(-1, width))


class _Exchange(torch.autograd.Function):
    """[tokens, numbers of a token] -> the same of the tokens that the ranks send."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return _exchanged(x, way)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grad, ctx.way.back), None
