"""cuDNN's attention, through torch: the fastest on Hopper and newer, for what it takes."""

from __future__ import annotations

import functools

import torch

from cpcompile.runtime.kernels import math
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FORMS, HALF, Case, Kernel, round_up, runs_on

Tensor = torch.Tensor
aten = torch.ops.aten
_MAX_DIM = 128
_LATENT_DIMS = (192, 128)  # of q and v in multi-head latent attention
_FIRST_WITH_LATENT_DIMS = 91100
# Older ones are wrong where a length is no multiple of 128 (pytorch/pytorch#169849).
_FIRST_RIGHT = 91501


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    if k.shape[2] == 1:  # cuDNN refuses a single key
        return math.forward(q, k, v, block)
    is_causal, scale = block.is_causal_square, block.scale
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal, False, scale=scale)
    return out, lse.view(q.shape[:3])


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    if k.shape[2] == 1:
        return math.backward(dout, q, k, v, out, lse, block)
    # Without dropout the random state is not read. Statistics in another memory order give wrong gradients.
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    return aten._scaled_dot_product_cudnn_attention_backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        out,
        lse.contiguous().unsqueeze(-1),
        unused,
        unused,
        None,
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        block.is_causal_square,
        scale=block.scale,
    )


@functools.cache
def _version() -> int:
    """Return cuDNN's version where torch uses it and the GPU is one that it is faster on than FlashAttention, else 0."""
    if not torch.cuda.is_available() or not torch.backends.cudnn.enabled:
        return 0
    is_new = torch.cuda.get_device_capability() >= (9, 0)
    return (torch.backends.cudnn.version() or 0) if is_new else 0  # type: ignore[no-untyped-call]


def _dims(case: Case) -> tuple[int, int]:
    dims = round_up(case.head_dim, 8), round_up(case.value_dim, 8)
    return dims if max(dims) <= _MAX_DIM else _LATENT_DIMS


def _limits(case: Case) -> str:
    reason = runs_on(case, "cuda", HALF)
    if reason:
        return reason
    fits = zip(_dims(case), (case.head_dim, case.value_dim), strict=True)
    if any(limit < size for limit, size in fits):
        return "needs head dims of at most 128, or 192 and 128"
    version = _version()
    if version < _FIRST_RIGHT or (_dims(case) == _LATENT_DIMS and version < _FIRST_WITH_LATENT_DIMS):
        return "needs a Hopper GPU or newer and cuDNN 9.15.1 or newer"
    return ""


def _avoids(case: Case) -> str:
    # For each new shape it plans for 40 ms forward and 50 ms backward (cuDNN 9.19, H100), many times what the kernel takes.
    return "plans anew for each length of a document" if case.features & FORMS else ""


KERNEL = Kernel("cudnn", forward, backward, _limits, frozenset(("causal",)), _dims, _avoids)
