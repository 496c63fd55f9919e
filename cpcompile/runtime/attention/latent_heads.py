"""Latent heads: Ulysses attention whose keys and values each rank has computed for its own heads and all tokens, from a latent.

Queries become heads, each rank computes its heads over all tokens, and the output goes back; keys and values never travel, nor
their gradients: those of this rank's heads are whole. Heads are a multiple of the ranks. They are exchanged in rounds, and kept
by heads or exchanged once more in backward, as in Ulysses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from cpcompile.runtime.attention import ring
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.heads import Heads, Ranks, rounds
from cpcompile.runtime.attention.partial_results import empty_result
from cpcompile.runtime.attention.ulysses import Grid, Started, in_rounds, tokens_to_heads
from cpcompile.runtime.transport.all_to_all import HeadExchange

Tensor = torch.Tensor
Kept = tuple[Tensor, Tensor]  # q and out of some of this rank's heads


def rounds_of(q: Tensor, k: Tensor, num_ranks: int, at_once: int) -> tuple[Ranks, ...]:
    """Return the heads of each rank in each round; k holds those of one rank."""
    return rounds(num_ranks, q.shape[1], k.shape[1] * num_ranks, at_once=at_once)


def _queries(ranks: Sequence[Heads]) -> list[tuple[slice]]:
    return [(slice(heads.start, heads.stop),) for heads in ranks]


def _within(own: Heads, whole: Heads) -> tuple[slice, slice]:
    """Return where the query heads and the key heads of a round are among those of its rank."""
    query = slice(own.start - whole.start, own.stop - whole.start)
    return query, slice(own.key_start - whole.key_start, own.key_stop - whole.key_start)


def _to_heads(tensors: Sequence[Tensor], ranks: Sequence[Heads], grid: Grid) -> Started:
    """Start to turn local tokens of all query heads into all tokens of this rank's."""
    of_rank = [query * len(tensors) for query in _queries(ranks)]
    return tokens_to_heads(tensors, of_rank, [ranks[grid.inner.rank].num_query] * len(tensors), grid)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, grid: Grid) -> tuple[Tensor, Tensor, list[Kept]]:
    """Return (out of the local rows, lse of this rank's heads, what each round keeps).

    Args:
        q: `[B, H, local tokens, D]`.
        k, v: `[B, own heads, S, D]` in the user's order.
        terms: what is computed.
        grid: the ranks; all of them exchange heads.
    """
    rank, each = grid.inner.rank, rounds_of(q, k, grid.inner.size, grid.at_once)
    statistics, kept = list[Tensor](), list[Kept]()
    out = empty_result(q, v)[0].zero_()

    def compute(ranks: Ranks, tensors: list[Tensor]) -> HeadExchange:
        (q_own,), own = tensors, ranks[rank]
        _, keys = _within(own, each[0][rank])
        of_heads = terms.of_heads(own.start, own.stop)
        out_own, lse = ring.attend(q_own, k[:, keys], v[:, keys], of_heads, grid.rows, grid.outer)
        statistics.append(lse)
        if grid.keeps_heads:
            kept.append((q_own, out_own))
        return grid.exchange.send_heads([out_own], [out], _queries(ranks))

    in_rounds(each, lambda ranks: _to_heads([q], ranks, grid), compute)
    return out, torch.cat(statistics, 1), kept


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: Sequence[Kept],
    terms: AttentionArguments,
    grid: Grid,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks); dk and dv are of this rank's heads.

    Of q and out only the number of heads and the head dims are read where the rounds kept theirs.
    """
    rank, each = grid.inner.rank, rounds_of(q, k, grid.inner.size, grid.at_once)
    held: Iterator[tuple[Tensor, ...]] = iter(kept)
    dq = dout.new_zeros(dout.shape[0], dout.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dsinks = None if terms.sinks is None else torch.zeros_like(terms.sinks)
    swapped = [dout] if kept else [q, out, dout]

    def compute(ranks: Ranks, tensors: list[Tensor]) -> HeadExchange:
        q_own, out_own, dout_own = (*next(held, ()), *tensors)
        own = ranks[rank]
        queries, keys = _within(own, each[0][rank])
        of_heads = terms.of_heads(own.start, own.stop)
        dq_own, dk[:, keys], dv[:, keys], dsinks_own = ring.attend_backward(
            dout_own, q_own, k[:, keys], v[:, keys], out_own, lse[:, queries], of_heads, grid.rows, grid.outer
        )
        if dsinks is not None and dsinks_own is not None:
            dsinks[own.start : own.stop] = dsinks_own
        return grid.exchange.send_heads([dq_own], [dq], _queries(ranks))

    in_rounds(each, lambda ranks: _to_heads(swapped, ranks, grid), compute)
    return dq, dk, dv, dsinks
