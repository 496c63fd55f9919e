"""Block kernels: attention of some query rows over some keys, behind one signature.

    forward(q, k, v, mask, scale, is_causal, softcap) -> out, lse
    backward(dout, q, k, v, out, lse, mask, scale, is_causal, softcap) -> dq, dk, dv

q `[B, H, Sq, D]`, k `[B, K, Skv, D]`, v `[B, K, Skv, Dv]`. `mask` broadcasts to `[B, H, Sq, Skv]` and is bool (True attends)
or is added to the scores; a float mask comes with whole rows. `is_causal` goes with square blocks and without a mask.
The backward takes `out` and `lse` over *all* keys, so the gradients of blocks add up and nothing is recomputed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.runtime import kernel_math, kernel_torch
from cpcompile.runtime.merge import accumulation_dtype

HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)


@dataclass(frozen=True, slots=True)
class Case:
    """What decides which kernels can compute a block. Made of fake tensors as well as of real ones."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    mask: str = "none"
    softcap: bool = False

    @classmethod
    def of(cls, q: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, softcap: float) -> Case:
        """Describe a block by its tensors."""
        kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
        return cls(q.device.type, q.dtype, int(q.shape[-1]), int(v.shape[-1]), kind, softcap > 0)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A provider: its two functions, and why it cannot take a case ('' when it can)."""

    name: str
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    refuses: Callable[[Case], str]


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel for a case, and one line on why not the faster ones."""

    kernel: Kernel
    reason: str


def _refuses(case: Case, device: str, dtypes: tuple[torch.dtype, ...], masks: tuple[str, ...]) -> str:
    """Return the first reason that the shipped kernels share."""
    if case.device != device:
        return f"runs on {device}"
    if case.dtype not in dtypes:
        return f"has no {str(case.dtype).removeprefix('torch.')}"
    if case.softcap:
        return "has no softcap"
    if case.mask not in masks:
        # The kernels recompute the softmax from lse, which is not exact for rows of finfo.min.
        return f"takes no {case.mask} mask"
    return "" if case.head_dim == case.value_dim else "needs equal head dims of q and v"


def _refuses_flash(case: Case) -> str:
    reason = _refuses(case, "cuda", HALF, ("none",))
    return reason or ("" if case.head_dim <= 256 and case.head_dim % 8 == 0 else "needs a head dim of 8, 16, ... 256")


@functools.cache
def _has_cudnn() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) and torch.backends.cudnn.enabled


def _refuses_cudnn(case: Case) -> str:
    reason = _refuses(case, "cuda", HALF, ("none",))
    if not reason and (case.head_dim > 128 or case.head_dim % 8):
        reason = "needs a head dim of 8, 16, ... 128"
    if not reason and torch.are_deterministic_algorithms_enabled():
        reason = "is not deterministic"
    # Before Hopper, FlashAttention is as fast; torch's own attention chooses alike.
    return reason or ("" if _has_cudnn() else "needs a Hopper GPU")


def _refuses_efficient(case: Case) -> str:
    reason = _refuses(case, "cuda", FLOATS, ("none", "bool"))
    return reason or ("" if case.head_dim % 8 == 0 else "needs a head dim that 8 divides")


def _refuses_cpu(case: Case) -> str:
    return _refuses(case, "cpu", (*FLOATS, torch.float64), ("none", "bool"))


KERNELS: tuple[Kernel, ...] = (  # fastest first; the last takes everything
    Kernel("cudnn", kernel_torch.cudnn_forward, kernel_torch.cudnn_backward, _refuses_cudnn),
    Kernel("cuda_flash", kernel_torch.flash_forward, kernel_torch.flash_backward, _refuses_flash),
    Kernel("cuda_efficient", kernel_torch.efficient_forward, kernel_torch.efficient_backward, _refuses_efficient),
    Kernel("cpu_flash", kernel_torch.cpu_forward, kernel_torch.cpu_backward, _refuses_cpu),
    Kernel("math", kernel_math.forward, kernel_math.backward, lambda case: ""),
)


def choose_kernel(case: Case) -> Choice:
    """Return the fastest kernel that takes the case; `reason` says why not those before it."""
    reasons: list[str] = []
    for kernel in KERNELS:
        reason = kernel.refuses(case)
        if not reason:
            return Choice(kernel, "; ".join(reasons))
        reasons.append(f"{kernel.name} {reason}")
    raise AssertionError("the math kernel takes every case")


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, **terms: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a block with the kernel chosen for it. `terms`: scale, is_causal, softcap."""
    if q.numel() == 0 or k.numel() == 0:
        # The CPU kernel divides by the number of keys; no kernel promises anything for empty operands.
        return q.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(
            q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype)
        )
    return choose_kernel(Case.of(q, v, mask, terms["softcap"])).kernel.forward(q, k, v, mask, **terms)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    mask: torch.Tensor | None,
    **terms: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of a block with the kernel that computed it."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    kernel = choose_kernel(Case.of(q, v, mask, terms["softcap"])).kernel
    return kernel.backward(dout, q, k, v, out, lse, mask, **terms)
