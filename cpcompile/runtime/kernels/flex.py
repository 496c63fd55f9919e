"""torch's FlexAttention: what hides keys and what is added to scores are compiled into the kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from cpcompile._torch import recording_gradients
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FEATURES, FLOATS, Case, Kernel, runs_on

Tensor = torch.Tensor
_MIN_DIM = 16
# One for each set of features, shape and dtype.
_MAX_COMPILED = 256


def _scalar(value: int, device: torch.device) -> Tensor:
    """Return a number as a tensor: one kernel serves all values, and none is copied from the host."""
    return torch.full((), value, dtype=torch.int64, device=device)


def mask_mod(block: Block, batch: int, heads: int, rows: int, columns: int, device: torch.device) -> Any:
    """Return which columns a row sees, as FlexAttention asks for it: a function of (batch, head, row, column)."""
    low = None if block.low is None else _scalar(block.low, device)
    high = None if block.high is None else _scalar(block.high, device)
    prefix = None if block.prefix is None else block.prefix.expand(batch)
    ids = None if block.documents is None else tuple(x.expand(batch, -1) for x in block.documents)
    padding = None if block.key_padding is None else block.key_padding.expand(batch, columns)
    mask = None if block.mask is None else block.mask.expand(batch, heads, rows, columns)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = i >= 0
        if high is not None:
            below = j - i <= high
            seen = seen & (below if prefix is None else below | (j < prefix[b]))
        if low is not None:
            seen = seen & (j - i >= low)
        if ids is not None:
            seen = seen & (ids[0][b, i] == ids[1][b, j])
        if padding is not None:
            seen = seen & padding[b, j]
        return seen if mask is None else seen & mask[b, h, i, j]

    return sees


def score_mod(block: Block, device: torch.device) -> Any:
    """Return what becomes of a scaled score, or None."""
    slopes, softcap, distance = block.slopes, block.softcap, _scalar(block.distance, device)
    if slopes is None and softcap == 0:
        return None

    def modified(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[h] * (i - j + distance).abs()

    return modified


def attend(
    q: Tensor, k: Tensor, v: Tensor, block: Block, attention: Callable[..., Any], block_mask: Callable[..., BlockMask]
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of a block by `flex_attention` and `create_block_mask`, compiled or not."""
    batch, heads, rows, columns = *q.shape[:3], k.shape[2]
    sizes = (batch, heads, rows, columns, q.device)
    mask = None
    if block.has_band or block.hides_more:
        of_heads = block.mask is not None and block.mask.shape[1] > 1
        tensors = (block.mask, block.key_padding, block.prefix, *(block.documents or ()))
        of_batch = any(x is not None and x.shape[0] > 1 for x in tensors)
        kept = batch if of_batch else None, heads if of_heads else None
        mask = block_mask(mask_mod(block, *sizes), *kept, rows, columns, q.device)
    out, aux = attention(
        q,
        k,
        v,
        score_mod(block, q.device),
        mask,
        block.scale,
        enable_gqa=heads != k.shape[1],
        return_aux=AuxRequest(lse=True),
        kernel_options={"BACKEND": "TRITON"},  # the one for few rows fails for 65 to 127 of grouped heads (torch 2.11)
    )
    return out, aux.lse


def gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of a block whose (out, lse) `run` recomputes, for `out` and `lse` over all keys.

    The whole is the mean of its blocks, `out = sum w_b out_b` with `w_b = exp(lse_b - lse)`, so that a block's out gets
    the gradient `w_b dout` and its lse gets `w_b dout . (out_b - out)`.
    """
    with recording_gradients():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        of_block, lse_of_block = run(*leaves)
        with torch.no_grad():
            share = torch.exp(lse_of_block - lse.masked_fill(lse == -torch.inf, torch.inf)).unsqueeze(-1)
            weighted = share * dout.to(share.dtype)
            dlse = (weighted * (of_block.to(share.dtype) - out.to(share.dtype))).sum(-1)
        grads = torch.autograd.grad((of_block, lse_of_block), leaves, (weighted.to(of_block.dtype), dlse))
    dq, dk, dv = grads
    return dq, dk, dv


@functools.cache
def _compiled() -> tuple[Any, Any]:
    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask, dynamic=False)


def _attend_compiled(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILED):
        return attend(q, k, v, block, *_compiled())


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return _attend_compiled(q, k, v, block)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    return gradients(dout, q, k, v, out, lse, lambda q, k, v: _attend_compiled(q, k, v, block))


def _limits(case: Case) -> str:
    return runs_on(case, "cuda", FLOATS)


def _dims(case: Case) -> tuple[int, int]:
    return max(case.head_dim, _MIN_DIM), max(case.value_dim, _MIN_DIM)


# Nothing can be dropped before the softmax, and it counts in units of log 2, where finfo.min of a float mask overflows.
KERNEL = Kernel("flex", forward, backward, _limits, FEATURES - {"lengths", "rectangles", "dropout", "bias"}, _dims)
