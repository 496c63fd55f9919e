"""Slices: whole tensors and the slices of the ranks, by indexing alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.ir.placement import Sharded

Ranks = list[Any]

Calls = list[Mapping[str, Any]]  # the arguments of each rank's call, by name


def factors(x: torch.Tensor, at: Sharded, tokens: int) -> torch.Tensor:
    """Return `x` with the dim of the tokens viewed as (outer, tokens, inner)."""
    sizes = (x.shape[at.dim] // (tokens * at.inner), tokens, at.inner)
    return x.reshape(*x.shape[: at.dim], *sizes, *x.shape[at.dim + 1 :])


def join(values: Sequence[torch.Tensor], at: Sharded, order: TokenOrder | Arrangement) -> torch.Tensor:
    """Return the tokens of the range that the ranks hold, in the user's order; 0 where it is not known what is outside."""
    parts = [factors(v, at, order.local_length) for v in values]
    slots = order.inverse(values[0].device)[max(at.front, 0) : order.length - max(at.back, 0)]
    held = torch.cat(parts, at.dim + 1).index_select(at.dim + 1, slots)
    shape = list(held.shape)
    outside = [
        held.new_full((*shape[: at.dim + 1], max(-n, 0), *shape[at.dim + 2 :]), at.outside or 0.0)
        for n in (at.front, at.back)
    ]
    return torch.cat([outside[0], held, outside[1]], at.dim + 1).flatten(at.dim, at.dim + 2)


def split(whole: torch.Tensor, at: Sharded, order: TokenOrder) -> list[torch.Tensor]:
    """Return each rank's tokens of a whole tensor; padding slots repeat the last token."""
    whole = factors(whole, at, order.length)
    indices = (order.sources(rank, whole.device) for rank in range(order.world_size))
    return [whole.index_select(at.dim + 1, index).flatten(at.dim, at.dim + 2) for index in indices]
