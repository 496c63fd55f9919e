"""Ring attention: KV blocks travel around the ranks while each computes with the block at hand (Liu et al., 2023).

With the zig-zag layout every rank has the same causal work at each step: half a block, without a mask.
"""

from __future__ import annotations

import torch

from cpcompile.runtime import comm
from cpcompile.runtime.block import Gradients, Result, Terms, empty_result
from cpcompile.runtime.differentiate import differentiate
from cpcompile.runtime.schedule import local_spans

Tensor = torch.Tensor


@torch.library.custom_op("cpcompile::ring_attention", mutates_args=())
def ring_attention(
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
    """Return (out, lse) of the local rows over all keys. `mask` is bool, the local rows over all columns."""
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError("ring_attention takes a bool mask only: a float mask needs whole rows, use gather_attention")
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    rank = comm.rank_in(world_size, group)
    rows = local_spans(length, rank, world_size, layout)
    result = Result(q, v)
    block = comm.pack([k, v])
    for step in range(world_size):
        if step + 1 < world_size:
            arriving = comm.send_next(block, world_size, group)
        k_, v_ = comm.unpack(block, [k.shape, v.shape])
        columns = local_spans(length, (rank - step) % world_size, world_size, layout)
        result.add(q, k_, v_, rows, columns, terms)
        if step + 1 < world_size:
            block = arriving.wait()
    return result.finish()


@ring_attention.register_fake
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


@torch.library.custom_op("cpcompile::ring_attention_backward", mutates_args=())
def ring_attention_backward(
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
    """Return (dq, dk, dv). The gradients of a block follow it, one step behind, and are home after world_size steps."""
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    rank = comm.rank_in(world_size, group)
    rows = local_spans(length, rank, world_size, layout)
    dq = torch.zeros_like(q, dtype=lse.dtype, memory_format=torch.contiguous_format)
    block = comm.pack([k, v])
    travelling: comm.Transfer | None = None
    for step in range(world_size):
        if step + 1 < world_size:
            arriving = comm.send_next(block, world_size, group)
        k_, v_ = comm.unpack(block, [k.shape, v.shape])
        columns = local_spans(length, (rank - step) % world_size, world_size, layout)
        grads = torch.zeros_like(block, dtype=lse.dtype)
        block_grads = Gradients(dq, *comm.unpack(grads, [k.shape, v.shape]))
        block_grads.add(dout, q, k_, v_, out, lse, rows, columns, terms)
        if travelling is not None:
            grads += travelling.wait()
        travelling = comm.send_next(grads, world_size, group)
        if step + 1 < world_size:
            block = arriving.wait()
    assert travelling is not None
    dk, dv = comm.unpack(travelling.wait(), [k.shape, v.shape])
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


@ring_attention_backward.register_fake
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


differentiate(ring_attention, ring_attention_backward)
