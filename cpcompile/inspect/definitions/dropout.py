"""Dropout: what is dropped, drawn for the whole tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions.slices import Calls, Ranks, join, split
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.tokens.dropout import is_kept


def shared_seed(calls: Calls) -> Ranks:
    return [torch.randint(-(1 << 63), (1 << 63) - 1, (), device=calls[0]["device"])] * len(calls)


def dropout(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"])
    whole = torch.empty_like(c["x"]) if at.dim < 0 else join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    index = torch.arange(whole.numel(), device=whole.device).view(whole.shape)
    kept = is_kept(c["seed"], c["site"], index, c["p"])
    return [c["x"] * mask / (1 - c["p"]) for c, mask in zip(calls, of_ranks(kept, at, c, len(calls)), strict=True)]


def draw_kept(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"], calls[0]["front"], calls[0]["back"])
    x = c["x"] if at.dim < 0 else join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    if c["of_features"]:
        x = x[(slice(None), slice(None), *[slice(1)] * (x.dim() - 2))]
    like = torch.empty([x.shape[d] for d in c["order"]], dtype=x.dtype, device=x.device)
    ones = torch.ones_like(like.permute([c["order"].index(d) for d in range(x.dim())]))
    drop = torch.feature_dropout if c["of_features"] else torch.dropout
    return of_ranks(drop(ones, c["p"], True) != 0, at, c, len(calls))


def of_ranks(kept: torch.Tensor, at: Sharded, c: Mapping[str, Any], world_size: int) -> Ranks:
    """Return each rank's part of a mask; tokens outside the range are dropped."""
    if at.dim < 0:
        return [kept] * world_size
    pads = [0, 0] * (kept.dim() - at.dim - 1) + [at.front * at.inner, at.back * at.inner]
    whole = torch.nn.functional.pad(kept, pads) if at.front or at.back else kept
    return split(whole, at, TokenOrder.of_call(c))
