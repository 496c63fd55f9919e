"""The memory-efficient attention that torch ships for CUDA: any bool mask, and float32."""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FLOATS, Case, Kernel, round_up, runs_on
from cpcompile.runtime.kernels.common import determinism, finite_reciprocal, without_empty_rows

Tensor = torch.Tensor
aten = torch.ops.aten
_ALIGNMENT = 16  # elements; the kernel reads rows of the bias in vectors


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask as an expanded bias whose rows start at aligned addresses."""
    if mask is None:
        return None
    columns = k.shape[2]
    bias = q.new_zeros(*mask.shape[:-1], round_up(columns, _ALIGNMENT))[..., :columns]
    return bias.masked_fill_(~mask, -torch.inf).expand(q.shape[0], q.shape[1], q.shape[2], columns)


def _repeat_heads(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    group, mask = q.shape[1] // k.shape[1], block.mask
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q,
        _repeat_heads(k, group),
        _repeat_heads(v, group),
        _bias(mask, q, k),
        True,
        0.0,
        block.is_causal_square,
        scale=block.scale,
    )
    out = out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out, without_empty_rows(lse[..., : q.shape[2]], mask)


def _sequence_major(x: Tensor) -> Tensor:
    """Return `[B, H, S, D]` over contiguous `[B, S, H, D]` memory: in half precision the kernel reads out by fixed strides."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    group, rows = q.shape[1] // k.shape[1], q.shape[2]
    # The kernel reads lse in tiles of 32 rows; +inf makes the rows that do not exist weigh nothing.
    padded = torch.nn.functional.pad(finite_reciprocal(lse), (0, -rows % 32), value=torch.inf)
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    with determinism(block):
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            _sequence_major(dout),
            q,
            _repeat_heads(k, group),
            _repeat_heads(v, group),
            _bias(block.mask, q, k),
            _sequence_major(out),
            padded,
            unused,
            unused,
            0.0,
            [True, True, True, False],
            block.is_causal_square,
            scale=block.scale,
        )
    if group > 1:
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _limits(case: Case) -> str:
    return runs_on(case, "cuda", FLOATS)


def _aligned_dims(case: Case) -> tuple[int, int]:
    return round_up(case.head_dim, 8), round_up(case.value_dim, 8)


# No float masks, as in the kernel for CPUs.
KERNEL = Kernel("efficient", forward, backward, _limits, frozenset(("causal", "mask", "deterministic")), _aligned_dims)
