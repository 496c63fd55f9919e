"""Ulysses attention: one all-to-all turns tokens into heads, each rank computes its heads over all tokens, one turns them back.

The heads that a rank received and computed are kept for backward, which sends gradients only (Jacobs et al., 2023).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cpcompile.runtime import comm
from cpcompile.runtime.attention import attend, attend_backward
from cpcompile.runtime.block import Terms, empty_result
from cpcompile.runtime.differentiate import differentiate
from cpcompile.runtime.heads import Heads, heads_of, storage
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.order import to_rank_order, to_user_order

Tensor = torch.Tensor


def _ranks(q: Tensor, k: Tensor, world_size: int) -> list[Heads]:
    return [heads_of(rank, world_size, q.shape[1], k.shape[1]) for rank in range(world_size)]


def _numel(shapes: Sequence[Sequence[int]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


def tokens_to_heads(
    messages: Sequence[Tensor], shapes: Sequence[Sequence[int]], length: int, layout: str, world_size: int, group: str
) -> list[Tensor]:
    """Exchange messages of local tokens of many heads; return tensors of all tokens, in order, of this rank's heads."""
    received = comm.all_to_all(messages, [_numel(shapes)] * world_size, world_size, group)
    parts = zip(*(comm.unpack(message, shapes) for message in received), strict=True)
    return [to_user_order(torch.cat(part, 2), 2, length, layout, world_size) for part in parts]


def heads_to_tokens(
    tensors: Sequence[Tensor],
    shapes: Sequence[Sequence[Sequence[int]]],
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> list[list[Tensor]]:
    """Exchange whole sequences of this rank's heads; return, for each rank, local tokens of its heads, `shapes[rank]`."""
    slices = [to_rank_order(x, 2, length, layout, world_size).chunk(world_size, 2) for x in tensors]
    messages = [comm.pack(parts) for parts in zip(*slices, strict=True)]
    received = comm.all_to_all(messages, [_numel(shape) for shape in shapes], world_size, group)
    return [comm.unpack(message, shape) for message, shape in zip(received, shapes, strict=True)]


def _own_terms(terms: Terms, own: Heads) -> Terms:
    """Return the terms with the mask of this rank's heads."""
    mask = terms.mask
    if mask is not None and mask.shape[1] > 1:
        mask = mask[:, own.start : own.stop]
    return Terms(mask, terms.documents, terms.key_padding, terms.scale, terms.is_causal, terms.window, terms.softcap)


def _expand(x: Tensor, index: list[int] | None) -> Tensor:
    """Return one key head for each query head, where kernels cannot pair them."""
    return x if index is None else x[:, index]


def _stored(x: Tensor, num_heads: int) -> Tensor:
    """Return a new tensor with `num_heads` heads, this rank's first and zeros after."""
    stored = x.new_zeros(x.shape[0], num_heads, *x.shape[2:])
    stored[:, : x.shape[1]] = x
    return stored


@torch.library.custom_op("cpcompile::ulysses_attention", mutates_args=())
def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (out of the local rows, lse, q, k, v and out of this rank's heads). `mask` is whole, bool or float."""
    ranks = _ranks(q, k, world_size)
    own = ranks[comm.rank_in(world_size, group)]
    terms = _own_terms(Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap), own)
    messages = [
        comm.pack([q[:, r.start : r.stop], k[:, r.key_start : r.key_stop], v[:, r.key_start : r.key_stop]])
        for r in ranks
    ]
    numbers = (own.num_query, own.num_key, own.num_key)
    shapes = [(x.shape[0], n, *x.shape[2:]) for x, n in zip((q, k, v), numbers, strict=True)]
    q_own, k_own, v_own = tokens_to_heads(messages, shapes, length, layout, world_size, group)
    index = own.key_index()
    out_own, lse = attend(q_own, _expand(k_own, index), _expand(v_own, index), terms)

    out_shapes = [[(q.shape[0], r.num_query, q.shape[2], v.shape[3])] for r in ranks]
    parts = heads_to_tokens([out_own], out_shapes, length, layout, world_size, group)
    out = empty_result(q, v)[0]
    torch.cat([part[0] for part in parts], 1, out=out)
    num_query, num_key = storage(world_size, q.shape[1], k.shape[1])
    return (
        out,
        _stored(lse, num_query),
        _stored(q_own, num_query),
        _stored(k_own, num_key),
        _stored(v_own, num_key),
        _stored(out_own, num_query),
    )


@ulysses_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_query, _, head_dim = q.shape
    num_query, num_key = storage(world_size, num_query, k.shape[1])
    return (
        empty_result(q, v)[0],
        q.new_empty(batch, num_query, length, dtype=accumulation_dtype(q.dtype)),
        q.new_empty(batch, num_query, length, head_dim),
        k.new_empty(batch, num_key, length, head_dim),
        v.new_empty(batch, num_key, length, v.shape[3]),
        q.new_empty(batch, num_query, length, v.shape[3]),
    )


@torch.library.custom_op("cpcompile::ulysses_attention_backward", mutates_args=())
def ulysses_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_heads: Tensor,
    k_heads: Tensor,
    v_heads: Tensor,
    out_heads: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv); the gradients of a key head that several ranks used are added here."""
    ranks = _ranks(q, k, world_size)
    own = ranks[comm.rank_in(world_size, group)]
    terms = _own_terms(Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap), own)
    messages = [comm.pack([dout[:, r.start : r.stop]]) for r in ranks]
    shape = (dout.shape[0], own.num_query, *dout.shape[2:])
    (dout_own,) = tokens_to_heads(messages, [shape], length, layout, world_size, group)
    index, n, m = own.key_index(), own.num_query, own.num_key
    k_own, v_own = _expand(k_heads[:, :m], index), _expand(v_heads[:, :m], index)
    grads = attend_backward(dout_own, q_heads[:, :n], k_own, v_own, out_heads[:, :n], lse[:, :n], terms)
    dq_own, dk_own, dv_own = grads[0], *(_summed(x, index, m) for x in grads[1:])

    batch, _, slots, _ = q.shape
    shapes = [
        [
            (batch, r.num_query, slots, q.shape[3]),
            (batch, r.num_key, slots, k.shape[3]),
            (batch, r.num_key, slots, v.shape[3]),
        ]
        for r in ranks
    ]
    parts = heads_to_tokens([dq_own, dk_own, dv_own], shapes, length, layout, world_size, group)
    dk, dv = (torch.zeros_like(x, dtype=lse.dtype, memory_format=torch.contiguous_format) for x in (k, v))
    for r, (_, dk_part, dv_part) in zip(ranks, parts, strict=True):
        dk[:, r.key_start : r.key_stop] += dk_part
        dv[:, r.key_start : r.key_stop] += dv_part
    return torch.cat([part[0] for part in parts], 1), dk.to(k.dtype), dv.to(v.dtype)


def _summed(x: Tensor, index: list[int] | None, num_heads: int) -> Tensor:
    """Return the sum over the query heads that read each key head; the adjoint of `_expand`."""
    if index is None:
        return x
    return torch.stack([x[:, [i for i, head in enumerate(index) if head == key]].sum(1) for key in range(num_heads)], 1)


@ulysses_attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q_heads: Tensor,
    k_heads: Tensor,
    v_heads: Tensor,
    out_heads: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


differentiate(ulysses_attention, ulysses_attention_backward)
