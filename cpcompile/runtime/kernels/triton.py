"""cpcompile's own kernels, in Triton: everything that a block can say, faster than FlashAttention 2."""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FEATURES, FLOATS, Case, Kernel, runs_on
from cpcompile.runtime.kernels.flash import is_installed

Tensor = torch.Tensor
_MAX_DIM = 256


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    from cpcompile.runtime.kernels import triton_forward  # Triton comes with torch for GPUs only

    return triton_forward.forward(q, k, v, block)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    from cpcompile.runtime.kernels import triton_backward

    return triton_backward.backward(dout, q, k, v, out, lse, block)


def _limits(case: Case) -> str:
    reason = runs_on(case, "cuda", FLOATS)
    if not reason and not is_installed("triton"):
        reason = "is not installed (pip install triton)"
    return reason or (
        "" if max(case.head_dim, case.value_dim) <= _MAX_DIM else f"needs head dims of at most {_MAX_DIM}"
    )


KERNEL = Kernel("triton", forward, backward, _limits, FEATURES - {"rectangles"})
