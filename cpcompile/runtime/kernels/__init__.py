"""Block kernels: attention of some rows over some columns, by one of several providers behind one signature.

    forward(q, k, v, block) -> out, lse
    backward(dout, q, k, v, out, lse, block) -> dq, dk, dv

q `[B, H, Sq, D]`, k `[B, K, Skv, D]`, v `[B, K, Skv, Dv]`, the last dim contiguous; out `[B, H, Sq, Dv]` in q's dtype; lse
`[B, H, Sq]` float32, or float64 for float64. A row that sees no column gives 0 and -inf. The backward takes `out` and `lse`
over *all* keys of an attention, so the gradients of blocks add up and nothing is recomputed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from cpcompile.runtime.block import Block
from cpcompile.runtime.kernels import adapt, cpu, cudnn, efficient, flash, flash_package, flex, math, own
from cpcompile.runtime.kernels.case import FEATURES, Case, Kernel, KernelError
from cpcompile.runtime.merge import accumulation_dtype

__all__ = [
    "FEATURES",
    "KERNELS",
    "NAMES",
    "Case",
    "Choice",
    "Kernel",
    "KernelError",
    "backward",
    "choose",
    "explain",
    "forward",
]

Tensor = torch.Tensor

# Fastest first, as measured on Hopper; the last takes everything. cuDNN and FlashAttention 3 and 4 use its asynchronous
# copies and products. The Triton kernels skip what is hidden and are 1.2 to 1.3 times as fast as the FlashAttention 2 that
# torch bundles. The memory-efficient kernel reads a mask of all rows and columns, FlexAttention compiles for each shape.
KERNELS: tuple[Kernel, ...] = (
    cudnn.KERNEL,
    flash.FLASH3,
    flash.FLASH4,
    own.KERNEL,
    flash.FLASH2,
    flash_package.FLASH_ATTN,
    flash_package.RING_FLASH_ATTN,
    efficient.KERNEL,
    flex.KERNEL,
    cpu.KERNEL,
    math.KERNEL,
)
MEASURED_DIM = 128  # head dims up to which the Triton kernels were seen to be faster than FlashAttention 2
NAMES: tuple[str, ...] = tuple(kernel.name for kernel in KERNELS)


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel for a case, and why not each of those before it: `name reason`."""

    kernel: Kernel
    reasons: tuple[str, ...] = ()


def _fastest_first(case: Case) -> tuple[Kernel, ...]:
    if max(case.head_dim, case.value_dim) <= MEASURED_DIM:
        return KERNELS
    first, last = KERNELS.index(own.KERNEL), KERNELS.index(efficient.KERNEL)
    return *KERNELS[:first], *KERNELS[first + 1 : last], own.KERNEL, *KERNELS[last:]


@functools.lru_cache(maxsize=256)
def choose(case: Case, kernel: str = "auto") -> Choice:
    """Return the fastest kernel that takes the case, or the one of that name.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the case.
    """
    reasons: list[str] = []
    if kernel == "auto":
        for candidate in _fastest_first(case):
            reason = candidate.refuses(case)
            if not reason:
                return Choice(candidate, tuple(reasons))
            reasons.append(f"{candidate.name} {reason}")
        raise AssertionError("the math kernel takes every case")
    if kernel not in NAMES:
        raise KernelError(f"no kernel is called {kernel!r}: there are auto, {', '.join(NAMES)}")
    asked = KERNELS[NAMES.index(kernel)]
    reason = asked.refuses(case)
    if reason:
        able = ", ".join(other.name for other in KERNELS if not other.refuses(case))
        raise KernelError(f"the kernel {kernel!r} {reason}. Kernels for this attention: auto, {able}")
    return Choice(asked)


def explain(case: Case, kernel: str = "auto") -> str:
    """Return in one line which kernel computes a case, in which way, and why none of the faster ones does."""
    choice = choose(case, kernel)
    ways = []
    if choice.kernel.needs_dense_mask(case):
        ways.append("with a mask of all rows and columns")
    if "lengths" in case.features - choice.kernel.takes:
        ways.append("one document at a time")
    if (dims := choice.kernel.dims(case)) != (case.head_dim, case.value_dim):
        ways.append(f"with head dims padded to {dims[0]} and {dims[1]}")
    how = " ".join((choice.kernel.name, ", ".join(ways))) if ways else choice.kernel.name
    return f"{how} ({'; '.join(choice.reasons)})" if choice.reasons else how


def _parts(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str) -> tuple[list[adapt.Part], str]:
    """Return what to compute call by call, nothing where nothing is visible, and the kernel to ask for."""
    rows, columns = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        # The CPU kernel divides by the number of keys; no kernel promises anything for empty operands.
        return [], kernel
    if torch.are_deterministic_algorithms_enabled() and not block.is_deterministic:
        block = replace(block, is_deterministic=True)
    if len(block.lengths) < 2:
        block = replace(block, lengths=()) if block.lengths else block
        part = adapt.trim(block, rows, columns)
        return ([] if part.is_empty else adapt.by_reach(part)), kernel
    chosen = choose(Case.of(q, v, block), kernel).kernel
    if "lengths" in chosen.takes and adapt.sees_diagonal(block):
        return [adapt.Part(slice(0, rows), slice(0, columns), block)], kernel
    return adapt.documents(block), chosen.name


def _prepare(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str) -> tuple[Kernel, tuple[int, int], Block]:
    """Return the kernel for a part, the head dims that it wants, and the block as it takes it."""
    case = Case.of(q, v, block)
    chosen = choose(case, kernel).kernel
    if chosen.needs_dense_mask(case):
        block = block.with_dense_mask(q.shape[2], k.shape[2], q.device)
    return chosen, chosen.dims(case), block


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute a block with the kernel chosen for it, or with the one of that name.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the block.
    """
    parts, kernel = _parts(q, k, v, block, kernel)
    if len(parts) == 1 and parts[0].is_whole(q.shape[2], k.shape[2]):
        return _forward(q, k, v, parts[0].block, kernel)
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    for part in parts:
        i, j = part.rows, part.columns
        out[:, :, i], lse[:, :, i] = _forward(q[:, :, i], k[:, :, j], v[:, :, j], part.block, kernel)
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str) -> tuple[Tensor, Tensor]:
    chosen, (head_dim, value_dim), block = _prepare(q, k, v, block, kernel)
    q, k, wide_v = adapt.with_dim(q, head_dim), adapt.with_dim(k, head_dim), adapt.with_dim(v, value_dim)
    out, lse = chosen.forward(q, k, wide_v, block)
    return out[..., : v.shape[3]], lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, kernel: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a block with the kernel that computed it, for `out` and `lse` over all keys.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the block.
    """
    parts, kernel = _parts(q, k, v, block, kernel)
    if len(parts) == 1 and parts[0].is_whole(q.shape[2], k.shape[2]):
        return _backward(dout, q, k, v, out, lse, parts[0].block, kernel)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for part in parts:
        i, j = part.rows, part.columns
        dq[:, :, i], part_dk, part_dv = _backward(
            dout[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], out[:, :, i], lse[:, :, i], part.block, kernel
        )
        dk[:, :, j] += part_dk
        dv[:, :, j] += part_dv
    return dq, dk, dv


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    chosen, (head_dim, value_dim), block = _prepare(q, k, v, block, kernel)
    wide_q, wide_k = (adapt.with_dim(x, head_dim) for x in (q, k))
    dout, wide_v, out = (adapt.with_dim(x, value_dim) for x in (dout, v, out))
    dq, dk, dv = chosen.backward(dout, wide_q, wide_k, wide_v, out, lse, block)
    return dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]
