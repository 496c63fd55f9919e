"""Attention: what every strategy promises, as whole matrices of scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions.slices import Calls, Ranks, join, split
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.tokens.dropout import is_kept


def attention(calls: Calls) -> Ranks:
    c = calls[0]
    order, at = TokenOrder.of_call(c), Sharded(2)
    q, k, v = (join([c[name] for c in calls], at, order) for name in "qkv")
    strategy = STRATEGIES[c["target"].split(".")[1].removesuffix("_attention")]
    mask = c["mask"] if strategy.takes_whole_mask else whole_mask(calls, order)
    out = reference_attention(q, k, v, mask, c)
    return [(part, None) for part in rows_of(out, at, order)]


def latent_attention(calls: Calls) -> Ranks:
    """Each rank has keys of all tokens, made by itself."""
    c = calls[0]
    order, at = TokenOrder.of_call(c), Sharded(2)
    q, mask = join([c["q"] for c in calls], at, order), whole_mask(calls, order)
    outs = [reference_attention(q, own["k"], own["v"], mask, own) for own in calls]
    return [(rows_of(out, at, order)[rank], None) for rank, out in enumerate(outs)]


def latent_heads_attention(calls: Calls) -> Ranks:
    """Each rank has keys of all tokens for its own heads, made by itself."""
    c = calls[0]
    order, at = TokenOrder.of_call(c), Sharded(2)
    k, v = (torch.cat([own[name] for own in calls], 1) for name in "kv")
    out = reference_attention(join([own["q"] for own in calls], at, order), k, v, c["mask"], c)
    return [(part, None) for part in rows_of(out, at, order)]


def rows_of(out: torch.Tensor, at: Sharded, order: TokenOrder) -> list[torch.Tensor]:
    """Return each rank's rows of a whole result; padding slots, for which nothing is computed, are 0."""
    return [
        torch.cat(
            [part.narrow(at.dim, 0, held), torch.zeros_like(part.narrow(at.dim, held, order.local_length - held))],
            at.dim,
        )
        for part, held in zip(split(out, at, order), map(order.num_held, range(order.world_size)), strict=True)
    ]


def whole_mask(calls: Calls, order: TokenOrder) -> torch.Tensor | None:
    """Return the mask of all rows, of which each rank has its own, or one row for all of them."""
    masks = [c["mask"] for c in calls]
    # Where every rank has one row, either way gives the same.
    has_own_rows = all(
        mask is not None and mask.shape[-2] == c["q"].shape[2] for mask, c in zip(masks, calls, strict=True)
    )
    return join(masks, Sharded(masks[0].dim() - 2), order) if has_own_rows else masks[0]


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, c: Mapping[str, Any]
) -> torch.Tensor:
    """Return attention as its definition says, whole, `[B, H, S, D]`; rows that see no key are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * c["scale"]
    if c["softcap"]:
        scores = c["softcap"] * torch.tanh(scores / c["softcap"])
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    if c["slopes"] is not None:
        scores = scores - c["slopes"].to(scores.dtype)[:, None, None] * (row - column).abs()
    seen = reference_mask(row, column, c)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    blind = ~seen.any(-1, keepdim=True)
    scores = scores.masked_fill(~seen & ~blind, float("-inf"))
    if c["sinks"] is not None:
        sinks = c["sinks"].to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : k.shape[2]].masked_fill(blind, 0.0)
    if c["dropout"]:
        index = torch.arange(weights.numel(), device=q.device).view(weights.shape)
        weights = weights * is_kept(c["seed"], c["site"], index, c["dropout"]) / (1 - c["dropout"])
    out: torch.Tensor = weights.to(v.dtype) @ v
    return out


def reference_mask(row: torch.Tensor, column: torch.Tensor, c: Mapping[str, Any]) -> torch.Tensor:
    """Return which key `column` each query `row` sees, bool `[B|1, 1, S, S]`, a dense mask apart."""
    seen = torch.ones(1, 1, len(row), column.shape[1], dtype=torch.bool, device=row.device)
    if c["is_causal"]:
        seen = seen & (column <= row)
    if c["lookahead"] >= 0:
        seen = seen & (column - row <= c["lookahead"])
    if c["prefix"] is not None:
        seen = seen | (column < c["prefix"][:, None, None, None])
    if c["window"]:
        seen = seen & (row - column < c["window"])
    if c["documents"] is not None:
        seen = seen & (c["documents"][:, None, :, None] == c["documents"][:, None, None, :])
    if c["key_padding"] is not None:
        seen = seen & c["key_padding"][:, None, None, :]
    return seen
