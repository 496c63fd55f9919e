"""Block kernels: attention of some rows over some columns, by one of several providers behind one signature.

    forward(q, k, v, block) -> out, lse
    backward(dout, q, k, v, out, lse, block) -> dq, dk, dv

q `[B, H, Sq, D]`, k `[B, K, Skv, D]`, v `[B, K, Skv, Dv]`, the last dim contiguous; out `[B, H, Sq, Dv]` in q's dtype; lse
`[B, H, Sq]` float32, or float64 for float64. A row that sees no column gives 0 and -inf. The backward takes `out` and `lse`
over *all* keys of an attention, so the gradients of blocks add up and nothing is recomputed. May import `tokens` and below.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch

from cpcompile.runtime.kernels import (
    adapt,
    cpu,
    cudnn,
    cudnn_varlen,
    efficient,
    flash,
    flash_package,
    flex,
    math,
    triton,
)
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import FEATURES, FORMS, Case, Kernel, KernelError, features
from cpcompile.runtime.kernels.merge import accumulation_dtype

__all__ = [
    "FEATURES",
    "FORMS",
    "KERNELS",
    "NAMES",
    "ON_HOPPER",
    "Case",
    "Kernel",
    "KernelChoice",
    "KernelError",
    "backward",
    "choose",
    "explain",
    "forward",
    "prefers_squares",
    "takes_rectangles",
]

Tensor = torch.Tensor
_log = logging.getLogger(__name__)

# Fastest first, as measured on Hopper; the last takes everything. cuDNN and FlashAttention 3 and 4 use its asynchronous
# copies and products. The Triton kernels skip what is hidden and are 1.2 to 1.3 times as fast as the FlashAttention 2 that
# torch bundles. The memory-efficient kernel reads a mask of all rows and columns, FlexAttention compiles for each shape.
KERNELS: tuple[Kernel, ...] = (
    flash.FLASH4,
    cudnn.KERNEL,
    cudnn_varlen.KERNEL,
    flash.FLASH3,
    triton.KERNEL,
    flash.FLASH2,
    flash_package.FLASH_ATTN,
    flash_package.RING_FLASH_ATTN,
    efficient.KERNEL,
    flex.KERNEL,
    cpu.KERNEL,
    math.KERNEL,
)
# What a plan counts on for GPUs that are not here: torch and nvidia-cudnn-frontend, which is recommended.
ON_HOPPER: tuple[Kernel, ...] = (cudnn.KERNEL, cudnn_varlen.KERNEL, triton.KERNEL, math.KERNEL)
MEASURED_DIM = 128  # head dims up to which the Triton kernels were seen to be faster than FlashAttention 2
NAMES: tuple[str, ...] = tuple(kernel.name for kernel in KERNELS)


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernel for a case, and why not each of those before it: `name reason`."""

    kernel: Kernel
    reasons: tuple[str, ...] = ()


def _fastest_first(case: Case) -> tuple[Kernel, ...]:
    if max(case.head_dim, case.value_dim) <= MEASURED_DIM:
        return KERNELS
    first, last = KERNELS.index(triton.KERNEL), KERNELS.index(efficient.KERNEL)
    return *KERNELS[:first], *KERNELS[first + 1 : last], triton.KERNEL, *KERNELS[last:]


@functools.cache
def _say_what_is_missing(name: str) -> None:
    _log.warning(
        "packed documents and windows run on %s kernels: pip install nvidia-cudnn-frontend makes them a third faster",
        name,
    )


@functools.lru_cache(maxsize=256)
def choose(case: Case, kernel: str = "auto") -> KernelChoice:
    """Return the fastest kernel that takes the case, or the one of that name.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the case.
    """
    reasons: list[str] = []
    if kernel == "auto":
        for candidate in _fastest_first(case):
            reason = candidate.refuses(case) or candidate.avoids(case)
            if not reason:
                if cudnn_varlen.is_missed(case) and candidate is not flash.FLASH4:
                    _say_what_is_missing(candidate.name)
                return KernelChoice(candidate, tuple(reasons))
            reasons.append(f"{candidate.name} {reason}")
        raise AssertionError("the math kernel takes every case")
    if kernel not in NAMES:
        raise KernelError(f"no kernel is called {kernel!r}: there are auto, {', '.join(NAMES)}")
    asked = KERNELS[NAMES.index(kernel)]
    reason = asked.refuses(case)
    if reason:
        able = ", ".join(other.name for other in KERNELS if not other.refuses(case))
        raise KernelError(f"the kernel {kernel!r} {reason}. Kernels for this attention: auto, {able}")
    return KernelChoice(asked)


def takes_rectangles(case: Case, kernel: str = "auto") -> bool:
    """Return whether one call of the kernel of a case computes many rectangles."""
    return "rectangles" in choose(case, kernel).kernel.takes


def prefers_squares(case_of: Callable[[Block], Case], block: Block, kernel: str = "auto") -> bool:
    """Return whether a causal window has another kernel where rows and columns are the same tokens than where they are not."""
    if kernel != "auto":
        return False
    square, shifted = (replace(block, low=low, high=low + 1) for low in (-1, 0))
    return choose(case_of(square), kernel).kernel is not choose(case_of(shifted), kernel).kernel


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


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One call of a kernel: for some rows and columns of a block, with head dims of its own."""

    part: adapt.Part
    kernel: Kernel
    dims: tuple[int, int]
    is_whole: bool
    needs_dense_mask: bool

    def block(self, q: Tensor, k: Tensor) -> Block:
        """Return the block as the kernel takes it."""
        block = self.part.block
        return block.with_dense_mask(q.shape[2], k.shape[2], q.device) if self.needs_dense_mask else block


def _calls(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str) -> tuple[KernelCall, ...]:
    """Return what to compute call by call, nothing where nothing is visible."""
    if q.numel() == 0 or k.numel() == 0:
        # The CPU kernel divides by the number of keys; no kernel promises anything for empty operands.
        return ()
    if torch.are_deterministic_algorithms_enabled() and not block.is_deterministic:
        block = replace(block, is_deterministic=True)
    plan = known_calls if block.is_of_numbers else known_calls.__wrapped__
    return plan(block, kernel, q.shape[2], k.shape[2], q.device.type, q.dtype, q.shape[3], v.shape[3])


@functools.lru_cache(maxsize=4096)
def known_calls(
    block: Block,
    kernel: str,
    rows: int,
    columns: int,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
) -> tuple[KernelCall, ...]:
    """Return what to compute call by call, planned once for all layers and steps that compute the same block."""

    def case_of(block: Block) -> Case:
        return Case(device, dtype, head_dim, value_dim, features(block))

    parts, asked = _parts(block, rows, columns, kernel, case_of)
    if kernel == "auto" and block.is_varied:
        parts = [x for part in parts for x in _of_known_sizes(part, case_of)]
        asked = "auto"

    def as_its_kernel_counts(part: adapt.Part) -> list[adapt.Part]:
        return adapt.by_reach(part) if choose(case_of(part.block), asked).kernel.is_cut_by_reach else [part]

    found = []
    for part in chain.from_iterable(map(as_its_kernel_counts, parts)):
        case = case_of(part.block)
        chosen = choose(case, asked).kernel
        is_whole, is_dense = part.is_whole(rows, columns), chosen.needs_dense_mask(case)
        found.append(KernelCall(part, chosen, chosen.dims(case), is_whole, is_dense))
    return tuple(found)


def _parts(
    block: Block, rows: int, columns: int, kernel: str, case_of: Callable[[Block], Case]
) -> tuple[list[adapt.Part], str]:
    """Return the parts of a block that kernels take, and the kernel to ask for."""
    if block.rectangles:
        chosen = choose(case_of(block), kernel).kernel
        if "rectangles" in chosen.takes and adapt.sees_last_corners(block):
            return [adapt.Part(slice(0, rows), slice(0, columns), block)], kernel
        return adapt.rectangles(block), chosen.name
    if len(block.lengths) < 2:
        block = replace(block, lengths=()) if block.lengths else block
        part = adapt.trim(block, rows, columns)
        return ([] if part.is_empty else [part]), kernel
    chosen = choose(case_of(block), kernel).kernel
    if "lengths" in chosen.takes and adapt.sees_diagonal(block):
        return [adapt.Part(slice(0, rows), slice(0, columns), block)], kernel
    return adapt.documents(block), chosen.name


def _of_known_sizes(part: adapt.Part, case_of: Callable[[Block], Case]) -> list[adapt.Part]:
    """Return a part as parts of sizes that recur and what is left of it, where another kernel is the fastest for these."""
    rest = choose(case_of(part.block)).kernel
    if "rectangles" in rest.takes:  # any size is as good
        return [part]
    parts = adapt.of_known_sizes(part)
    known = [x.block for x in parts if not x.block.is_varied]
    return parts if any(choose(case_of(block)).kernel is not rest for block in known) else [part]


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, kernel: str = "auto") -> tuple[Tensor, Tensor]:
    """Compute a block with the kernel chosen for it, or with the one of that name.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the block.
    """
    calls = _calls(q, k, v, block, kernel)
    if len(calls) == 1 and calls[0].is_whole:
        return _forward(q, k, v, calls[0])
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=accumulation_dtype(q.dtype))
    for call in calls:
        i, j = call.part.rows, call.part.columns
        out[:, :, i], lse[:, :, i] = _forward(q[:, :, i], k[:, :, j], v[:, :, j], call)
    return out, lse


def _forward(q: Tensor, k: Tensor, v: Tensor, call: KernelCall) -> tuple[Tensor, Tensor]:
    (head_dim, value_dim), block = call.dims, call.block(q, k)
    q, k, wide_v = adapt.with_dim(q, head_dim), adapt.with_dim(k, head_dim), adapt.with_dim(v, value_dim)
    out, lse = call.kernel.forward(q, k, wide_v, block)
    return adapt.without_dim(out, v.shape[3]), lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block, kernel: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a block with the kernel that computed it, for `out` and `lse` over all keys.

    Raises:
        KernelError: there is no such kernel, or it cannot compute the block.
    """
    calls = _calls(q, k, v, block, kernel)
    if len(calls) == 1 and calls[0].is_whole:
        return _backward(dout, q, k, v, out, lse, calls[0])
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for call in calls:
        i, j = call.part.rows, call.part.columns
        dq[:, :, i], part_dk, part_dv = _backward(
            dout[:, :, i], q[:, :, i], k[:, :, j], v[:, :, j], out[:, :, i], lse[:, :, i], call
        )
        dk[:, :, j] += part_dk
        dv[:, :, j] += part_dv
    return dq, dk, dv


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: KernelCall
) -> tuple[Tensor, Tensor, Tensor]:
    (head_dim, value_dim), block = call.dims, call.block(q, k)
    wide_q, wide_k = adapt.with_dim(q, head_dim), adapt.with_dim(k, head_dim)
    dout, wide_v, out = adapt.with_dim(dout, value_dim), adapt.with_dim(v, value_dim), adapt.with_dim(out, value_dim)
    dq, dk, dv = call.kernel.backward(dout, wide_q, wide_k, wide_v, out, lse, block)
    return (
        adapt.without_dim(dq, q.shape[3]),
        adapt.without_dim(dk, k.shape[3]),
        adapt.without_dim(dv, v.shape[3]),
    )
