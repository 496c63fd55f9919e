"""FlashAttention 2, which torch bundles, and 3 and 4, which packages bring to the same signature."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import current_flash_attention_impl

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import HALF, Case, Kernel, KernelError, round_up, runs_on
from cpcompile.runtime.kernels.common import determinism

Tensor = torch.Tensor
aten = torch.ops.aten


def window(block: Block, rows: int, columns: int) -> tuple[int, int]:
    """Return the band as FlashAttention counts it: keys to the left and right of the diagonal that ends at the last key.

    -1 is no bound. Every row sees a key and every column is seen, so neither is negative otherwise.
    """
    shift = 0 if block.lengths else columns - rows
    left = -1 if block.low is None else shift - block.low
    right = -1 if block.high is None else block.high - shift
    assert (block.low is None or left >= 0) and (block.high is None or right >= 0), (block.low, block.high)
    return left, right


def _terms(block: Block, rows: int, columns: int) -> tuple[bool, dict[str, Any]]:
    """Return whether the band is the causal one, and the keywords, with the bounds that there are."""
    left, right = window(block, rows, columns)
    is_causal = left < 0 and right == 0
    bounds = {} if is_causal else {"window_size_left": left, "window_size_right": right}
    return is_causal, {"scale": block.scale, **{name: bound for name, bound in bounds.items() if bound >= 0}}


@functools.lru_cache(maxsize=64)
def starts(lengths: tuple[int, ...], batch: int, device: torch.device) -> Tensor:
    """Return int32 offsets of the documents of a batch, laid one after the other, and of their end."""
    offsets = [0]
    for length in lengths * batch:
        offsets.append(offsets[-1] + length)
    return torch.tensor(offsets, dtype=torch.int32, device=device)


def packed(x_BHSD: Tensor) -> Tensor:
    """Return the tokens of the batch one after the other, `[B * S, H, D]`."""
    return x_BHSD.transpose(1, 2).flatten(0, 1)


def unpacked(x_THD: Tensor, batch: int) -> Tensor:
    """Return `[B, H, S, D]` of packed tokens."""
    return torch.unflatten(x_THD, 0, (batch, -1)).transpose(1, 2)


def run_forward(call: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Compute a block by a function with the signature of `aten._flash_attention_forward`."""
    is_causal, terms = _terms(block, q.shape[2], k.shape[2])
    if not block.lengths:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        sizes = (q.shape[2], k.shape[2])
        out, lse, *_ = call(q_, k_, v_, None, None, *sizes, 0.0, is_causal, False, **terms)
        return out.transpose(1, 2), lse
    batch, longest = q.shape[0], max(block.lengths)
    at = starts(block.lengths, batch, q.device)
    out, lse, *_ = call(*map(packed, (q, k, v)), at, at, longest, longest, 0.0, is_causal, False, **terms)
    return unpacked(out, batch), torch.unflatten(lse, 1, (batch, -1)).transpose(0, 1)


def run_backward(
    call: Callable[..., Any], dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients by a function with the signature of `aten._flash_attention_backward`."""
    is_causal, terms = _terms(block, q.shape[2], k.shape[2])
    # Without dropout the random state is not read. lse is read as if it were contiguous.
    unused = torch.empty(0, dtype=torch.int64, device=q.device)
    with determinism(block):
        if not block.lengths:
            dense = (x.transpose(1, 2) for x in (dout, q, k, v, out))
            sizes = (q.shape[2], k.shape[2])
            grads = call(*dense, lse.contiguous(), None, None, *sizes, 0.0, is_causal, unused, unused, **terms)
            dq, dk, dv = (x.transpose(1, 2) for x in grads)
            return dq, dk, dv
        batch, longest = q.shape[0], max(block.lengths)
        at = starts(block.lengths, batch, q.device)
        rows = (*map(packed, (dout, q, k, v, out)), lse.transpose(0, 1).flatten(1).contiguous())
        grads = call(*rows, at, at, longest, longest, 0.0, is_causal, unused, unused, **terms)
        dq, dk, dv = (unpacked(x, batch) for x in grads)
        return dq, dk, dv


def equal_dims(case: Case) -> tuple[int, int]:
    """Return the head dims that FlashAttention reads: one, and a multiple of 8."""
    size = round_up(max(case.head_dim, case.value_dim), 8)
    return size, size


@functools.cache
def is_installed(module: str) -> bool:
    """Return whether a module can be found; its packages are imported, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


@functools.cache
def gpu_generation() -> int:
    """Return the first number of the compute capability (9: Hopper, 10: Blackwell), 0 without a GPU."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@dataclass(frozen=True, slots=True)
class Package:
    """What brings a FlashAttention: a module, how pip installs it, and the generations of GPUs that it is for (none: all)."""

    module: str
    pip: str
    generations: tuple[int, ...] = ()


def limits_of(most_dims: int, package: Package | None) -> Callable[[Case], str]:
    """Return the limits of a FlashAttention that a package brings (None: torch), up to a head dim."""

    def limits(case: Case) -> str:
        reason = runs_on(case, "cuda", HALF)
        if not reason and package is None:
            reason = replaced_by()
        if not reason and package is not None:
            reason = missing(package)
        return reason or ("" if max(equal_dims(case)) <= most_dims else f"needs head dims of at most {most_dims}")

    return limits


def missing(package: Package) -> str:
    """Return what is missing for a package, or ''."""
    if not is_installed(package.module):
        return f"is not installed (pip install {package.pip})"
    if package.generations and gpu_generation() not in package.generations:
        names = {9: "Hopper", 10: "Blackwell"}
        return f"needs a {' or '.join(names[n] for n in package.generations)} GPU"
    return ""


def replaced_by() -> str:
    """Return what `activate_flash_attention_impl` put in the place of torch's own kernels, as a reason; or ''."""
    name = current_flash_attention_impl()
    if name is None:
        return ""
    return (
        f"is {name} in this process, by torch.nn.attention.activate_flash_attention_impl, which takes other attentions than "
        "FlashAttention 2 (restore_flash_attention_impl() ends that)"
    )


def _provider(name: str, find: Callable[[], tuple[Any, Any]], limits: Callable[[Case], str], *takes: str) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        return run_forward(find()[0], q, k, v, block)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run_backward(find()[1], dout, q, k, v, out, lse, block)

    return Kernel(name, forward, backward, limits, frozenset(takes), equal_dims, is_cut_by_reach=True)


def _bundled() -> tuple[Any, Any]:
    if reason := replaced_by():  # since the kernel was chosen
        raise KernelError(f"the kernel 'flash' {reason}")
    return aten._flash_attention_forward, aten._flash_attention_backward


# `torch.nn.attention.activate_flash_attention_impl` would replace torch's own attention in the whole process, the user's
# too, at each call; the functions that it registers can be called without it.
@functools.cache
def _flash3() -> tuple[Any, Any]:
    module = importlib.import_module("torch.nn.attention._fa3")
    module._fa3_import_module(FLASH3_PACKAGE.module)
    return module._fa3_flash_attention_forward_impl_default, module._fa3_flash_attention_backward_impl


# Those of torch 2.11 to 2.13 expect two results of a function that has returned more since flash-attn-4 4.0.0b20.
@functools.cache
def _flash4() -> tuple[Any, Any]:
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # of what it compiles, for the next process
    warnings.filterwarnings("ignore", r"Argument \w+ \(position \d+\) cannot be converted to a JitArgument")
    module = importlib.import_module("flash_attn.cute.interface")

    def terms(is_causal: bool, at: Tensor | None, longest: int, scale: float) -> dict[str, Any]:
        named = {"softmax_scale": scale, "causal": is_causal, "cu_seqlens_q": at, "cu_seqlens_k": at}
        of_documents = {} if at is None else {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return named | of_documents

    def forward(
        q: Tensor, k: Tensor, v: Tensor, at: Tensor | None, _: Any, longest: int, *unused: Any, scale: float
    ) -> Any:
        return module._flash_attn_fwd(q, k, v, **terms(unused[2], at, longest, scale), return_lse=True)

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        at: Tensor | None,
        _: Any,
        longest: int,
        *unused: Any,
        scale: float,
    ) -> Any:
        return module._flash_attn_bwd(q, k, v, out, dout, lse, **terms(unused[2], at, longest, scale))

    return forward, backward


def _avoids_4(case: Case) -> str:
    if "rectangles" in case.features:
        return "computes one rectangle at a time"
    # Alone it is 1.2 times as fast on documents, but a step of 16 with 64k tokens on two H200s took 608 ms, and 600 with cuDNN.
    if "lengths" in case.features and is_installed("cudnn"):
        return "made no step with documents faster than cudnn_varlen"
    # H200, 32k tokens, forward and backward: 1.12 to 1.25 times as fast as cuDNN.
    return "" if gpu_generation() == 9 or "lengths" in case.features else "was measured beside cuDNN on Hopper only"


# Of 4.0.0b36 the gradients of queries are wrong for 8, 80 and 104 on Hopper: it leaves columns at zero.
HEAD_DIMS_4 = (64, 96, 128)


def _limits_4(case: Case) -> str:
    reason = limits_of(max(HEAD_DIMS_4), FLASH4_PACKAGE)(case)
    is_known = max(equal_dims(case)) in HEAD_DIMS_4
    return reason or ("" if is_known else f"was proven exact for head dims of {', '.join(map(str, HEAD_DIMS_4))} only")


FLASH3_PACKAGE = Package(
    "flash_attn_interface", "flash-attn-3 --index-url https://download.pytorch.org/whl/cu130", (9,)
)
FLASH4_PACKAGE = Package("flash_attn.cute", "flash-attn-4", (9, 10))
FLASH2 = _provider("flash", _bundled, limits_of(256, None), "causal", "window", "band", "lengths", "deterministic")
# Its backward adds up gradients of queries in a changing order, in some versions whatever it is asked for.
FLASH3 = _provider("flash3", _flash3, limits_of(256, FLASH3_PACKAGE), "causal", "window", "band", "lengths")
# What its backward makes of bands and of deterministic mode differs between its versions.
FLASH4 = replace(_provider("flash4", _flash4, _limits_4, "causal", "lengths"), avoids=_avoids_4)
