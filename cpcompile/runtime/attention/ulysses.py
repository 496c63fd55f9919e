"""Ulysses attention: tokens become heads, each rank computes its heads over all tokens, and back (Jacobs et al., 2023).

With an outer ring it is USP (Fang and Zhao, 2024): inner ranks exchange heads, outer ones compute ring attention. The heads
that a rank received and computed are kept for backward, which sends gradients only. Where heads divide, one half is computed
while the other is on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention import ring as ring_attention
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.heads import Heads, Ranks, rounds, storage
from cpcompile.runtime.attention.key_needs import place
from cpcompile.runtime.attention.partial_results import empty_result
from cpcompile.runtime.kernels.merge import accumulation_dtype
from cpcompile.runtime.schedule import by_position, num_tokens
from cpcompile.runtime.transport.all_to_all import Exchange, HeadExchange
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # lse, q, k, v and out of this rank's heads


@dataclass(frozen=True)
class Grid:
    """The ranks that exchange heads (`inner`) and those among which keys travel (`outer`).

    `spans[o][i]` are the tokens of the rank at (outer o, inner i), and `room` the slots for all tokens of inner ranks: as
    many in each group, though one may hold fewer tokens. `most_rounds`: see `heads.rounds`.
    """

    inner: Ring
    outer: Ring
    spans: tuple[tuple[Spans, ...], ...]
    room: int
    most_rounds: int

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

    def rounds(self, q: Tensor, k: Tensor) -> tuple[Ranks, ...]:
        """Return the heads of each inner rank, in rounds: some are exchanged while others are computed."""
        return rounds(self.inner.size, q.shape[1], k.shape[1], self.most_rounds)


def tokens_to_heads(
    tensors: Sequence[Tensor], of_rank: Sequence[Sequence[slice]], stored: Sequence[int], grid: Grid
) -> tuple[list[Tensor], HeadExchange]:
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


def attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, grid: Grid) -> tuple[Tensor, list[Kept]]:
    """Return (out of the local rows, what each round keeps). A mask has the rows of the group."""
    out = empty_result(q, v)[0]
    _clear_padding(out, grid)
    rooms = storage(grid.inner.size, q.shape[1], k.shape[1])
    each = grid.rounds(q, k)

    def start(ranks: Ranks) -> tuple[list[Tensor], HeadExchange]:
        of_rank = [_slices(heads) for heads in ranks]
        num_query, num_key = (room // len(each) for room in rooms)
        return tokens_to_heads((q, k, v), of_rank, (num_query, num_key, num_key), grid)

    kept: list[Kept] = []
    homes: list[HeadExchange] = []
    arriving = start(each[0])
    for ranks, following in zip(each, (*each[1:], None), strict=True):
        tensors, swap = arriving
        if following is not None:
            arriving = start(following)
        swap.finish()
        own = ranks[grid.inner.rank]
        index, numbers = own.key_index(), (own.num_query, own.num_key, own.num_key)
        q_own, k_own, v_own = (x[:, :n] for x, n in zip(tensors, numbers, strict=True))
        keys = _expand(k_own, index), _expand(v_own, index)
        out_own, lse = ring_attention.attend(q_own, *keys, terms.of_heads(own.start, own.stop), grid.rows, grid.outer)
        queries = [_slices(heads)[:1] for heads in ranks]
        homes.append(grid.exchange.send_heads([out_own], [out], queries))
        room = rooms[0] // len(each)
        q_all, k_all, v_all = tensors
        kept.append((_stored(lse, room), q_all, k_all, v_all, _stored(out_own, room)))
    for home in homes:
        home.finish()
    return out, kept


def _clear_padding(x: Tensor, grid: Grid) -> None:
    """Set the slots without a token to 0; they come last."""
    count = num_tokens(grid.spans[grid.outer.rank][grid.inner.rank])
    if count < x.shape[2]:
        x[:, :, count:] = 0


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Sequence[Kept], terms: AttentionArguments, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks); the gradients of a key head that several ranks used are added here."""
    each = grid.rounds(q, k)
    dsinks = None if terms.sinks is None else torch.zeros_like(terms.sinks)
    is_shared = any(a.key_stop > b.key_start for a, b in pairwise(each[0]))
    homes: list[HeadExchange] = []
    # The gradients of a key head that several ranks read come from each, one behind the other.
    num_keys = sum(heads.num_key for heads in each[0]) if is_shared else k.shape[1]
    targets = [_blank(x, count, grid) for x, count in ((q, q.shape[1]), (k, num_keys), (v, num_keys))]

    def start(ranks: Ranks) -> tuple[list[Tensor], HeadExchange]:
        return tokens_to_heads([dout], [_slices(h)[:1] for h in ranks], [ranks[grid.inner.rank].num_query], grid)

    arriving = start(each[0])
    for ranks, following, tensors in zip(each, (*each[1:], None), kept, strict=True):
        (dout_own,), swap = arriving
        if following is not None:
            arriving = start(following)
        own = ranks[grid.inner.rank]
        index, n, m = own.key_index(), own.num_query, own.num_key
        lse, q_own, k_own, v_own, out_own = (x[:, :size] for x, size in zip(tensors, (n, n, m, m, n), strict=True))
        keys = _expand(k_own, index), _expand(v_own, index)
        of_heads = terms.of_heads(own.start, own.stop)
        swap.finish()
        dq_own, dk_own, dv_own, dsinks_own = ring_attention.attend_backward(
            dout_own, q_own, *keys, out_own, lse, of_heads, grid.rows, grid.outer
        )
        grads = [dq_own, _summed(dk_own, index, m), _summed(dv_own, index, m)]
        of_rank = [_slices(heads) for heads in ranks]
        if is_shared:
            of_rank = [(query, key, key) for (query, *_), key in zip(of_rank, _apart(ranks), strict=True)]
        homes.append(grid.exchange.send_heads(grads, targets, of_rank))
        if dsinks is not None and dsinks_own is not None:
            dsinks[own.start : own.stop] = dsinks_own
    for home in homes:
        home.finish()
    dq, dk, dv = targets
    if is_shared:
        dk, dv = (_added_up(x, found, each[0]) for x, found in ((k, dk), (v, dv)))
    return dq, dk, dv, dsinks


def _blank(like: Tensor, num_heads: int, grid: Grid) -> Tensor:
    """Return a tensor of so many heads without values, 0 in slots without a token."""
    shape = like.shape[0], like.shape[2], num_heads, like.shape[3]
    blank = torch.empty_like(like) if num_heads == like.shape[1] else like.new_empty(shape).transpose(1, 2)
    _clear_padding(blank, grid)
    return blank


def _apart(ranks: Sequence[Heads]) -> list[slice]:
    """Return where the key heads of each rank are if none is shared."""
    ends = accumulate((heads.num_key for heads in ranks), initial=0)
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _added_up(like: Tensor, found: Tensor, ranks: Sequence[Heads]) -> Tensor:
    """Return the sum of the gradients that the ranks found for their key heads."""
    total = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
    for heads, part in zip(ranks, _apart(ranks), strict=True):
        total[:, heads.key_start : heads.key_stop] += found[:, part]
    return total.to(like.dtype)


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
