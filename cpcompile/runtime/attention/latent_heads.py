"""Latent heads: Ulysses attention whose keys and values each rank has computed for its own heads and all tokens, from a latent.

Queries become heads, each rank computes its heads over all tokens, and the output goes back; keys and values never travel, nor
their gradients: those of this rank's heads are whole. Heads are a multiple of the ranks. As in Ulysses, one half of them is
computed while the other is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpcompile.runtime.attention import ring
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.heads import Heads, Ranks, rounds
from cpcompile.runtime.attention.partial_results import empty_result
from cpcompile.runtime.attention.ulysses import Grid, tokens_to_heads
from cpcompile.runtime.transport.all_to_all import HeadExchange

Tensor = torch.Tensor
Kept = tuple[Tensor, Tensor, Tensor]  # lse, q and out of some of this rank's heads


def rounds_of(q: Tensor, k: Tensor, num_ranks: int) -> tuple[Ranks, ...]:
    """Return the heads of each rank in each round; k holds those of one rank."""
    return rounds(num_ranks, q.shape[1], k.shape[1] * num_ranks)


def _queries(ranks: Sequence[Heads]) -> list[tuple[slice]]:
    return [(slice(heads.start, heads.stop),) for heads in ranks]


def _keys(each: tuple[Ranks, ...], number: int, rank: int) -> slice:
    """Return the key heads of a round among those of a rank."""
    first, own = each[0][rank], each[number][rank]
    return slice(own.key_start - first.key_start, own.key_stop - first.key_start)


def _to_heads(x: Tensor, ranks: Sequence[Heads], grid: Grid) -> tuple[list[Tensor], HeadExchange]:
    """Start to turn local tokens of all heads into all tokens of this rank's heads."""
    return tokens_to_heads([x], _queries(ranks), [ranks[grid.inner.rank].num_query], grid)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, grid: Grid) -> tuple[Tensor, list[Kept]]:
    """Return (out of the local rows, what each round keeps).

    Args:
        q: `[B, H, local tokens, D]`.
        k, v: `[B, own heads, S, D]` in the user's order.
        terms: what is computed.
        grid: the ranks; all of them exchange heads.
    """
    rank, each, kept, homes = grid.inner.rank, rounds_of(q, k, grid.inner.size), list[Kept](), list[HeadExchange]()
    out = empty_result(q, v)[0].zero_()
    arriving = _to_heads(q, each[0], grid)
    for number, (ranks, following) in enumerate(zip(each, (*each[1:], None), strict=True)):
        (q_own,), swap = arriving
        if following is not None:
            arriving = _to_heads(q, following, grid)
        swap.finish()
        own, keys = ranks[rank], _keys(each, number, rank)
        of_heads = terms.of_heads(own.start, own.stop)
        out_own, lse = ring.attend(q_own, k[:, keys], v[:, keys], of_heads, grid.rows, grid.outer)
        homes.append(grid.exchange.send_heads([out_own], [out], _queries(ranks)))
        kept.append((lse, q_own, out_own))
    for home in homes:
        home.finish()
    return out, kept


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Kept], terms: AttentionArguments, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks); dk and dv are of this rank's heads."""
    rank, each, homes = grid.inner.rank, rounds_of(q, k, grid.inner.size), list[HeadExchange]()
    dq, dk, dv = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
    dsinks = None if terms.sinks is None else torch.zeros_like(terms.sinks)
    arriving = _to_heads(dout, each[0], grid)
    for number, (ranks, following) in enumerate(zip(each, (*each[1:], None), strict=True)):
        (dout_own,), swap = arriving
        if following is not None:
            arriving = _to_heads(dout, following, grid)
        lse, q_own, out_own = kept[number]
        own, keys = ranks[rank], _keys(each, number, rank)
        of_heads = terms.of_heads(own.start, own.stop)
        swap.finish()
        dq_own, dk[:, keys], dv[:, keys], dsinks_own = ring.attend_backward(
            dout_own, q_own, k[:, keys], v[:, keys], out_own, lse, of_heads, grid.rows, grid.outer
        )
        homes.append(grid.exchange.send_heads([dq_own], [dq], _queries(ranks)))
        if dsinks is not None and dsinks_own is not None:
            dsinks[own.start : own.stop] = dsinks_own
    for home in homes:
        home.finish()
    return dq, dk, dv, dsinks
