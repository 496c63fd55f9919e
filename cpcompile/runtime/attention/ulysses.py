"""Ulysses attention: tokens become heads, each rank computes its heads over all tokens, and back (Jacobs et al., 2023).

With an outer ring it is USP (Fang and Zhao, 2024): inner ranks exchange heads, outer ones compute ring attention. Heads are
exchanged in rounds, so that some are computed while the next are on their way. What a rank received and computed by heads is
kept for backward, which sends gradients only; or none of it, and backward exchanges q, k, v and out once more. Then there may
be as many rounds as key heads, and a rank holds the heads of two of them (UPipe, https://arxiv.org/abs/2602.21196).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention import ring as ring_attention
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.heads import Heads, Ranks, heads_of_ranks, rounds, storage
from cpcompile.runtime.attention.key_needs import place
from cpcompile.runtime.attention.partial_results import empty_result
from cpcompile.runtime.kernels.merge import accumulation_dtype
from cpcompile.runtime.schedule import by_position, num_tokens
from cpcompile.runtime.transport.all_to_all import Exchange, HeadExchange
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor
Kept = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v and out of some of this rank's heads
Started = tuple[list[Tensor], HeadExchange]  # tensors of some heads that are on their way


@dataclass(frozen=True)
class Grid:
    """The ranks that exchange heads (`inner`) and those among which keys travel (`outer`).

    `spans[o][i]` are the tokens of the rank at (outer o, inner i), and `room` the slots for all tokens of inner ranks: as
    many in each group, though one may hold fewer tokens. `most_rounds`, `at_once`: see `heads.rounds`. `keeps_heads`: what a
    rank received and computed by heads is kept for backward.
    """

    inner: Ring
    outer: Ring
    spans: tuple[tuple[Spans, ...], ...]
    room: int
    most_rounds: int
    at_once: int = 0
    keeps_heads: bool = True

    @cached_property
    def rows(self) -> tuple[Spans, ...]:
        """The tokens of each group of inner ranks, in the order of their positions."""
        return tuple(by_position([span for spans in group for span in spans]) for group in self.spans)

    @cached_property
    def places(self) -> list[list[tuple[slice, slice]]]:
        """For the tokens of each inner rank, (its slots, the slots in the rows of its group)."""
        rows = self.rows[self.outer.rank]
        found: list[list[tuple[slice, slice]]] = []
        for spans in self.spans[self.outer.rank]:
            found.append([])
            for at in ((span.slots, place(span, rows).slots) for span in spans):
                last = found[-1][-1] if found[-1] else None
                if last and (last[0].stop, last[1].stop) == (at[0].start, at[1].start):
                    at = slice(last[0].start, at[0].stop), slice(last[1].start, at[1].stop)
                    found[-1].pop()
                found[-1].append(at)
        return found

    @cached_property
    def exchange(self) -> Exchange:
        """What the inner ranks copy to exchange heads."""
        return Exchange(self.places, self.inner)

    def rounds(self, num_query: int, num_key: int) -> tuple[Ranks, ...]:
        """Return the heads of each inner rank, in rounds: some are exchanged while others are computed."""
        return rounds(self.inner.size, num_query, num_key, self.most_rounds, self.at_once)


def in_rounds(
    each: Sequence[Ranks],
    start: Callable[[Ranks], Started],
    compute: Callable[[Ranks, list[Tensor]], HeadExchange],
) -> None:
    """Compute round after round, while the next one arrives and the last one goes home; no more of them have memory."""
    arriving, home = start(each[0]), None
    for ranks, following in zip(each, (*each[1:], None), strict=True):
        tensors, swap = arriving
        if following is not None:
            arriving = start(following)
        swap.finish()
        leaving = compute(ranks, tensors)
        if home is not None:
            home.finish()
        home = leaving
    assert home is not None
    home.finish()


def tokens_to_heads(
    tensors: Sequence[Tensor], of_rank: Sequence[Sequence[slice]], stored: Sequence[int], grid: Grid
) -> Started:
    """Start to turn local tokens of some heads into all tokens of the group for this rank's heads.

    Args:
        tensors: `[B, H, local tokens, D]` each.
        of_rank: for each inner rank the heads that it gets of each tensor.
        stored: how many heads the results have room for; the rest is 0.
        grid: the ranks.
    """
    held = num_tokens(grid.rows[grid.outer.rank])
    results = []
    for x, heads, room in zip(tensors, of_rank[grid.inner.rank], stored, strict=True):
        # Tokens before heads, so that what one rank sends is one run of memory.
        results.append(x.new_empty(x.shape[0], grid.room, room, x.shape[3]).transpose(1, 2))
        if heads.stop - heads.start < room:
            results[-1][:, heads.stop - heads.start :] = 0
        if held < grid.room:
            results[-1][:, :, held:] = 0
    return results, grid.exchange.send_tokens(tensors, results, of_rank)


def _slices(heads: Heads) -> tuple[slice, slice, slice]:
    key = slice(heads.key_start, heads.key_stop)
    return slice(heads.start, heads.stop), key, key


def _expand(x: Tensor, index: list[int] | None) -> Tensor:
    """Return one key head for each query head, where kernels cannot pair them."""
    return x if index is None else torch.cat([x[:, head : head + 1] for head in index], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, grid: Grid) -> tuple[Tensor, Tensor, list[Kept]]:
    """Return (out of the local rows, lse of this rank's heads, what each round keeps). A mask has the rows of the group."""
    out = empty_result(q, v)[0]
    _clear_padding(out, grid)
    each, rank = grid.rounds(q.shape[1], k.shape[1]), grid.inner.rank
    rooms = storage(grid.inner.size, q.shape[1], k.shape[1])
    statistics: list[Tensor] = []
    kept: list[Kept] = []

    def sizes(own: Heads) -> tuple[int, int]:
        # What is kept has one shape on all ranks.
        return (rooms[0] // len(each), rooms[1] // len(each)) if grid.keeps_heads else (own.num_query, own.num_key)

    def start(ranks: Ranks) -> Started:
        num_query, num_key = sizes(ranks[rank])
        of_rank = [_slices(heads) for heads in ranks]
        return tokens_to_heads((q, k, v), of_rank, (num_query, num_key, num_key), grid)

    def compute(ranks: Ranks, tensors: list[Tensor]) -> HeadExchange:
        own = ranks[rank]
        index, numbers = own.key_index(), (own.num_query, own.num_key, own.num_key)
        q_own, k_own, v_own = (x[:, :n] for x, n in zip(tensors, numbers, strict=True))
        keys = _expand(k_own, index), _expand(v_own, index)
        out_own, lse = ring_attention.attend(q_own, *keys, terms.of_heads(own.start, own.stop), grid.rows, grid.outer)
        statistics.append(lse)
        if grid.keeps_heads:
            q_all, k_all, v_all = tensors
            kept.append((q_all, k_all, v_all, _stored(out_own, sizes(own)[0])))
        return grid.exchange.send_heads([out_own], [out], [_slices(heads)[:1] for heads in ranks])

    in_rounds(each, start, compute)
    return out, _stored(torch.cat(statistics, 1), rooms[0]), kept


def _clear_padding(x: Tensor, grid: Grid) -> None:
    """Set the slots without a token to 0; they come last."""
    count = num_tokens(grid.spans[grid.outer.rank][grid.inner.rank])
    if count < x.shape[2]:
        x[:, :, count:] = 0


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
    """Return (dq, dk, dv, dsinks); the gradients of a key head that several ranks used are added here.

    Of q, k, v and out only the number of heads and the head dims are read where the rounds kept theirs.
    """
    num_query, num_key = q.shape[1], k.shape[1]
    each, whole, rank = (
        grid.rounds(num_query, num_key),
        heads_of_ranks(grid.inner.size, num_query, num_key),
        grid.inner.rank,
    )
    dsinks = None if terms.sinks is None else torch.zeros_like(terms.sinks)
    held = iter(kept)
    # The gradients of a key head that several ranks read come from each, one behind the other.
    apart = _apart(whole)
    targets = [_blank(dout, x.shape[3], n, grid) for x, n in ((q, num_query), (k, apart[-1].stop), (v, apart[-1].stop))]

    def start(ranks: Ranks) -> Started:
        own, of_rank = ranks[rank], [_slices(heads) for heads in ranks]
        if kept:
            return tokens_to_heads([dout], [(query,) for query, *_ in of_rank], [own.num_query], grid)
        stored = own.num_query, own.num_key, own.num_key, own.num_query, own.num_query
        return tokens_to_heads((q, k, v, out, dout), [(*x, x[0], x[0]) for x in of_rank], stored, grid)

    def compute(ranks: Ranks, tensors: list[Tensor]) -> HeadExchange:
        own = ranks[rank]
        index, n, m = own.key_index(), own.num_query, own.num_key
        q_own, k_own, v_own, out_own, dout_own = (
            x[:, :size] for x, size in zip((*next(held, ()), *tensors), (n, m, m, n, n), strict=True)
        )
        first = own.start - whole[rank].start
        keys = _expand(k_own, index), _expand(v_own, index)
        dq_own, dk_own, dv_own, dsinks_own = ring_attention.attend_backward(
            dout_own,
            q_own,
            *keys,
            out_own,
            lse[:, first : first + n],
            terms.of_heads(own.start, own.stop),
            grid.rows,
            grid.outer,
        )
        if dsinks is not None and dsinks_own is not None:
            dsinks[own.start : own.stop] = dsinks_own
        grads = [dq_own, _summed(dk_own, index, m), _summed(dv_own, index, m)]
        keys_apart = [_moved(heads, all_of, at) for heads, all_of, at in zip(ranks, whole, apart, strict=True)]
        of_rank = [(_slices(heads)[0], key, key) for heads, key in zip(ranks, keys_apart, strict=True)]
        return grid.exchange.send_heads(grads, targets, of_rank)

    in_rounds(each, start, compute)
    dq, dk, dv = targets
    if dk.shape[1] > num_key:
        dk, dv = (_added_up(x, num_key, whole) for x in (dk, dv))
    return dq, dk, dv, dsinks


def _blank(like: Tensor, head_dim: int, num_heads: int, grid: Grid) -> Tensor:
    """Return a tensor of so many heads of the tokens of another, without values, 0 in slots without a token."""
    blank = like.new_empty(like.shape[0], like.shape[2], num_heads, head_dim).transpose(1, 2)
    _clear_padding(blank, grid)
    return blank


def _apart(ranks: Sequence[Heads]) -> list[slice]:
    """Return where the key heads of each rank are if none is shared."""
    ends = accumulate((heads.num_key for heads in ranks), initial=0)
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _moved(heads: Heads, whole: Heads, place: slice) -> slice:
    """Return where the key heads of a round are, if all those of their rank are at a place."""
    by = place.start - whole.key_start
    return slice(heads.key_start + by, heads.key_stop + by)


def _added_up(found: Tensor, num_heads: int, ranks: Sequence[Heads]) -> Tensor:
    """Return the sum of the gradients that the ranks found for their key heads."""
    batch, _, tokens, dim = found.shape
    total = found.new_zeros(batch, tokens, num_heads, dim, dtype=accumulation_dtype(found.dtype)).transpose(1, 2)
    for heads, part in zip(ranks, _apart(ranks), strict=True):
        total[:, heads.key_start : heads.key_stop] += found[:, part]
    return total.to(found.dtype)


def _summed(x: Tensor, index: list[int] | None, num_heads: int) -> Tensor:
    """Return the sum over the query heads that read each key head; the adjoint of `_expand`."""
    if index is None:
        return x
    return torch.stack([x[:, [i for i, head in enumerate(index) if head == key]].sum(1) for key in range(num_heads)], 1)


def _stored(x: Tensor, num_heads: int) -> Tensor:
    """Return `x` with room for `num_heads` heads, zeros behind its own; the heads of a token stay neighbours."""
    if x.shape[1] == num_heads:
        return x
    more = [0, 0, 0, num_heads - x.shape[1]]
    if x.dim() == 3:
        return torch.nn.functional.pad(x, more)
    return torch.nn.functional.pad(x.transpose(1, 2), more).transpose(1, 2)
