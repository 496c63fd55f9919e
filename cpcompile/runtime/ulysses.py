"""Ulysses attention: tokens become heads, each rank computes its heads over all tokens, and back (Jacobs et al., 2023).

With an outer ring it is USP (Fang and Zhao, 2024): inner ranks exchange heads, outer ones compute ring attention. The heads
that a rank received and computed are kept for backward, which sends gradients only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from cpcompile.runtime import ring as ring_attention
from cpcompile.runtime.heads import Heads, heads_of, storage
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.partial import empty_result
from cpcompile.runtime.post import Ring, swap
from cpcompile.runtime.schedule import Spans, by_position
from cpcompile.runtime.terms import Terms

Tensor = torch.Tensor
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Grid:
    """The ranks that exchange heads (`inner`) and those among which keys travel (`outer`).

    `spans[o][i]` are the tokens of the rank at (outer o, inner i), and `room` the slots for all tokens of inner ranks: as
    many in each group, though one may hold fewer tokens.
    """

    inner: Ring
    outer: Ring
    spans: tuple[tuple[Spans, ...], ...]
    room: int

    @property
    def rows(self) -> tuple[Spans, ...]:
        """The tokens of each group of inner ranks, in the order of their positions."""
        return tuple(by_position([span for spans in group for span in spans]) for group in self.spans)

    def places(self, inner: int) -> list[tuple[slice, slice]]:
        """Return, for the tokens of an inner rank, (its slots, the slots in the rows of its group)."""
        rows, found = self.rows[self.outer.rank], []
        for span in self.spans[self.outer.rank][inner]:
            (run,) = [r for r in rows if r.position <= span.position < r.end]
            found.append((span.slots, run.between(span.position, span.end).slots))
        return found

    def heads(self, q: Tensor, k: Tensor) -> list[Heads]:
        """Return the heads of each inner rank."""
        return [heads_of(rank, self.inner.size, q.shape[1], k.shape[1]) for rank in range(self.inner.size)]


def _by_token(x: Tensor) -> Tensor:
    """Return `[B, H, S, D]` as `[S, B, H, D]`."""
    return x.permute(2, 0, 1, 3)


def tokens_to_heads(
    tensors: Sequence[Tensor], of_rank: Sequence[Sequence[slice]], stored: Sequence[int], grid: Grid
) -> list[Tensor]:
    """Turn local tokens of all heads into all tokens of the group for this rank's heads.

    Args:
        tensors: `[B, H, local tokens, D]` each.
        of_rank: for each inner rank the heads that it gets of each tensor.
        stored: how many heads the results have room for; the rest is 0.
        grid: the ranks.
    """
    inner = grid.inner
    num_tokens = sum(span.size for span in grid.rows[grid.outer.rank])
    own = of_rank[inner.rank]
    results = []
    for x, heads, room in zip(tensors, own, stored, strict=True):
        # Tokens before heads, so that what one rank sends is one run of memory.
        results.append(x.new_empty(x.shape[0], grid.room, room, x.shape[3]).transpose(1, 2))
        results[-1][:, heads.stop - heads.start :] = 0
        results[-1][:, :, num_tokens:] = 0
    sent = [
        [
            _by_token(x[:, heads, slots])
            for x, heads in zip(tensors, of_rank[to], strict=True)
            for slots, _ in grid.places(inner.rank)
        ]
        for to in range(inner.size)
    ]
    received = [
        [
            _by_token(x[:, : heads.stop - heads.start, slots])
            for x, heads in zip(results, own, strict=True)
            for _, slots in grid.places(source)
        ]
        for source in range(inner.size)
    ]

    def sizes(source: int, receiver: int) -> list[int]:
        spans = grid.spans[grid.outer.rank][source]
        widths = [(h.stop - h.start) * x.shape[0] * x.shape[3] for h, x in zip(of_rank[receiver], tensors, strict=True)]
        return [width * span.size for width in widths for span in spans]

    swap(sent, received, sizes, tensors[0], inner)
    return results


def heads_to_tokens(
    tensors: Sequence[Tensor], of_rank: Sequence[Sequence[slice]], targets: Sequence[Sequence[Tensor]], grid: Grid
) -> None:
    """Turn all tokens of the group for this rank's heads into local tokens: the adjoint of `tokens_to_heads`.

    Args:
        tensors: `[B, own heads, tokens of the group, D]` each.
        of_rank: for each inner rank the heads that it has of each tensor.
        targets: for each inner rank, where its heads of the local tokens go, `[B, heads, local tokens, D]` each.
        grid: the ranks.
    """
    inner = grid.inner
    sent = [[_by_token(x[:, :, slots]) for x in tensors for _, slots in grid.places(to)] for to in range(inner.size)]
    received = [
        [_by_token(x[:, :, slots]) for x in targets[source] for slots, _ in grid.places(inner.rank)]
        for source in range(inner.size)
    ]

    def sizes(source: int, receiver: int) -> list[int]:
        spans = grid.spans[grid.outer.rank][receiver]
        widths = [(h.stop - h.start) * x.shape[0] * x.shape[3] for h, x in zip(of_rank[source], tensors, strict=True)]
        return [width * span.size for width in widths for span in spans]

    swap(sent, received, sizes, tensors[0], inner)


def _slices(heads: Heads) -> tuple[slice, slice, slice]:
    key = slice(heads.key_start, heads.key_stop)
    return slice(heads.start, heads.stop), key, key


def _expand(x: Tensor, index: list[int] | None) -> Tensor:
    """Return one key head for each query head, where kernels cannot pair them."""
    return x if index is None else torch.cat([x[:, head : head + 1] for head in index], 1)


def attend(q: Tensor, k: Tensor, v: Tensor, terms: Terms, grid: Grid) -> tuple[Tensor, Kept]:
    """Return (out of the local rows, (lse, q, k, v and out of this rank's heads)). A mask has the rows of the group."""
    ranks = grid.heads(q, k)
    own, index = ranks[grid.inner.rank], ranks[grid.inner.rank].key_index()
    num_query, num_key = storage(grid.inner.size, q.shape[1], k.shape[1])
    of_rank = [_slices(heads) for heads in ranks]
    kept = tokens_to_heads((q, k, v), of_rank, (num_query, num_key, num_key), grid)
    q_own, k_own, v_own = (x[:, :n] for x, n in zip(kept, (own.num_query, own.num_key, own.num_key), strict=True))
    of_heads = terms.of_heads(own.start, own.stop)
    keys = _expand(k_own, index), _expand(v_own, index)
    out_own, lse = ring_attention.attend(q_own, *keys, of_heads, grid.rows, grid.outer)

    out = empty_result(q, v)[0]
    _clear_padding(out, grid)
    heads_to_tokens([out_own], [[s[0]] for s in of_rank], [[out[:, s[0]]] for s in of_rank], grid)
    return out, (_stored(lse, num_query), *kept, _stored(out_own, num_query))  # type: ignore[return-value]


def _clear_padding(x: Tensor, grid: Grid) -> None:
    """Set the slots without a token to 0; they come last."""
    x[:, :, sum(span.size for span in grid.spans[grid.outer.rank][grid.inner.rank]) :] = 0


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: Kept, terms: Terms, grid: Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks); the gradients of a key head that several ranks used are added here."""
    ranks = grid.heads(q, k)
    own, index = ranks[grid.inner.rank], ranks[grid.inner.rank].key_index()
    of_rank = [_slices(heads) for heads in ranks]
    (dout_own,) = tokens_to_heads([dout], [[s[0]] for s in of_rank], [own.num_query], grid)
    n, m = own.num_query, own.num_key
    lse, q_own, k_own, v_own, out_own = (x[:, :size] for x, size in zip(kept, (n, n, m, m, n), strict=True))
    dq_own, dk_own, dv_own, dsinks_own = ring_attention.attend_backward(
        dout_own,
        q_own,
        _expand(k_own, index),
        _expand(v_own, index),
        out_own,
        lse,
        terms.of_heads(own.start, own.stop),
        grid.rows,
        grid.outer,
    )
    grads = dq_own, _summed(dk_own, index, m), _summed(dv_own, index, m)
    dq, dk, dv = (_blank(x, grid) for x in (q, k, v))
    is_shared = any(a.key_stop > b.key_start for a, b in pairwise(ranks))
    homes = []
    for query, key, value in of_rank:
        # A key head that another rank adds to as well gets a tensor from each.
        keys = [_blank(x[:, heads], grid) if is_shared else x[:, heads] for x, heads in ((dk, key), (dv, value))]
        homes.append([dq[:, query], *keys])
    heads_to_tokens(grads, of_rank, homes, grid)
    if is_shared:
        dk, dv = (
            _added_up(x, [(s[i], home[i]) for s, home in zip(of_rank, homes, strict=True)]) for i, x in ((1, k), (2, v))
        )
    dsinks = None
    if dsinks_own is not None:
        dsinks = dsinks_own.new_zeros(q.shape[1])
        dsinks[own.start : own.stop] = dsinks_own
    return dq, dk, dv, dsinks


def _blank(x: Tensor, grid: Grid) -> Tensor:
    """Return a tensor like `x` without values, 0 in slots without a token."""
    blank = torch.empty_like(x)
    _clear_padding(blank, grid)
    return blank


def _added_up(like: Tensor, parts: Sequence[tuple[slice, Tensor]]) -> Tensor:
    """Return the sum of gradients of some heads each."""
    total = torch.zeros_like(like, dtype=accumulation_dtype(like.dtype))
    for heads, part in parts:
        total[:, heads] += part
    return total.to(like.dtype)


def _summed(x: Tensor, index: list[int] | None, num_heads: int) -> Tensor:
    """Return the sum over the query heads that read each key head; the adjoint of `_expand`."""
    if index is None:
        return x
    return torch.stack([x[:, [i for i, head in enumerate(index) if head == key]].sum(1) for key in range(num_heads)], 1)


def _stored(x: Tensor, num_heads: int) -> Tensor:
    """Return `x` with room for `num_heads` heads, zeros behind its own."""
    if x.shape[1] == num_heads:
        return x
    stored = x.new_zeros(x.shape[0], num_heads, *x.shape[2:])
    stored[:, : x.shape[1]] = x
    return stored
