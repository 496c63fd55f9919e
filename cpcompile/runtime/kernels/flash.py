"""FlashAttention 2, which torch bundles, and 3 and 4, which packages bring to the same signature."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import HALF, Case, Kernel, round_up, runs_on
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
    """Return whether the band is the causal one, and the keywords; some versions of FlashAttention 4 read -1 as a bound."""
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


def limits_of(device_dims: int, module: str, package: str) -> Callable[[Case], str]:
    """Return the limits of a FlashAttention that a package brings ('' for torch), up to a head dim."""

    def limits(case: Case) -> str:
        reason = runs_on(case, "cuda", HALF)
        if not reason and module and not is_installed(module):
            reason = f"is not installed (pip install {package})"
        return reason or ("" if max(equal_dims(case)) <= device_dims else f"needs head dims of at most {device_dims}")

    return limits


def _provider(name: str, find: Callable[[], tuple[Any, Any]], limits: Callable[[Case], str], *takes: str) -> Kernel:
    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        return run_forward(find()[0], q, k, v, block)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        return run_backward(find()[1], dout, q, k, v, out, lse, block)

    return Kernel(name, forward, backward, limits, frozenset(takes), equal_dims)


def _bundled() -> tuple[Any, Any]:
    return aten._flash_attention_forward, aten._flash_attention_backward


# `torch.nn.attention.activate_flash_attention_impl` would replace torch's own attention in the whole process, the user's
# too, at each call; the functions that it registers can be called without it.
@functools.cache
def _flash3() -> tuple[Any, Any]:
    module = importlib.import_module("torch.nn.attention._fa3")
    module._fa3_import_module("flash_attn_interface")
    return module._fa3_flash_attention_forward_impl_default, module._fa3_flash_attention_backward_impl


@functools.cache
def _flash4() -> tuple[Any, Any]:
    module: Any = importlib.import_module("torch.nn.attention._fa4")
    path = "flash_attn.cute.interface"
    module._fa4_import_module(path)
    module._FA4_MODULE_PATH = path  # what the two functions import again, from a cache
    return module._fa4_flash_attention_forward_impl, module._fa4_flash_attention_backward_impl


FLASH2 = _provider("flash", _bundled, limits_of(256, "", ""), "causal", "window", "band", "lengths", "deterministic")
FLASH3 = _provider(
    "flash3",
    _flash3,
    limits_of(256, "flash_attn_interface", "flash-attn-3"),
    "causal",
    "window",
    "band",
    "lengths",
    "deterministic",
)
# What its backward makes of bands and of deterministic mode differs between its versions.
FLASH4 = _provider("flash4", _flash4, limits_of(128, "flash_attn.cute", "flash-attn-4"), "causal", "lengths")
