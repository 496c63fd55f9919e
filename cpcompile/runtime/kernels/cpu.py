"""The FlashAttention that torch ships for CPUs."""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FLOATS, Case, Kernel, runs_on
from cpcompile.runtime.kernels.common import finite_reciprocal, without_empty_rows

Tensor = torch.Tensor
aten = torch.ops.aten


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return a bool mask as one that is added to the scores."""
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, block.is_causal_square, attn_mask=_additive(block.mask, q.dtype), scale=block.scale
    )
    return out, without_empty_rows(lse, block.mask)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    mask = _additive(block.mask, q.dtype)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        dout, q, k, v, out, finite_reciprocal(lse), 0.0, block.is_causal_square, attn_mask=mask, scale=block.scale
    )


def _limits(case: Case) -> str:
    return runs_on(case, "cpu", (*FLOATS, torch.float64))


def _equal_dims(case: Case) -> tuple[int, int]:
    size = max(case.head_dim, case.value_dim)
    return size, size


# No float masks: the backward recomputes the softmax from lse, which is not exact for rows of finfo.min.
KERNEL = Kernel("cpu_flash", forward, backward, _limits, frozenset(("causal", "mask", "deterministic")), _equal_dims)
