"""Gathered attention: every rank computes its own query rows over all keys (the scheme of Llama 3, Dubey et al., 2024).

Keys are gathered again in backward: between the passes a rank holds its own keys only.
"""

from __future__ import annotations

import torch

from cpcompile.runtime import comm
from cpcompile.runtime.block import Gradients, Result, Terms, empty_result
from cpcompile.runtime.differentiate import differentiate
from cpcompile.runtime.order import to_rank_order, to_user_order
from cpcompile.runtime.schedule import local_spans, whole

Tensor = torch.Tensor


def gather_keys(k: Tensor, v: Tensor, length: int, layout: str, world_size: int, group: str) -> tuple[Tensor, Tensor]:
    """Return all keys and values in the user's order, gathered in one message."""
    messages = comm.all_gather(comm.pack([k, v]), world_size, group)
    parts = zip(*(comm.unpack(message, [k.shape, v.shape]) for message in messages), strict=True)
    k_all, v_all = (to_user_order(torch.cat(part, 2), 2, length, layout, world_size) for part in parts)
    return k_all, v_all


def scatter_gradients(grads: Gradients, length: int, layout: str, world_size: int, group: str) -> tuple[Tensor, Tensor]:
    """Return (dk, dv) of the local keys, summed over the ranks; the adjoint of `gather_keys`."""
    parts = [to_rank_order(x, 2, length, layout, world_size).chunk(world_size, 2) for x in (grads.dk, grads.dv)]
    messages = torch.stack([comm.pack(part) for part in zip(*parts, strict=True)])
    dk, dv = comm.unpack(comm.reduce_scatter(messages, world_size, group), [part[0].shape for part in parts])
    return dk, dv


@torch.library.custom_op("cpcompile::gather_attention", mutates_args=())
def gather_attention(
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
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys. `mask` is bool or float, the local rows over all columns."""
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    rows = local_spans(length, comm.rank_in(world_size, group), world_size, layout)
    k_all, v_all = gather_keys(k, v, length, layout, world_size, group)
    result = Result(q, v)
    result.add(q, k_all, v_all, rows, whole(length), terms)
    return result.finish()


@gather_attention.register_fake
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
) -> tuple[Tensor, Tensor]:
    return empty_result(q, v)


@torch.library.custom_op("cpcompile::gather_attention_backward", mutates_args=())
def gather_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv): the gradients of the gathered keys are summed over the ranks on their way home."""
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    rows = local_spans(length, comm.rank_in(world_size, group), world_size, layout)
    k_all, v_all = gather_keys(k, v, length, layout, world_size, group)
    grads = Gradients.empty(q, k_all, v_all)
    grads.add(dout, q, k_all, v_all, out, lse, rows, whole(length), terms)
    dk, dv = scatter_gradients(grads, length, layout, world_size, group)
    return grads.dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@gather_attention_backward.register_fake
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


differentiate(gather_attention, gather_attention_backward)
