"""The packages flash-attn and ring-flash-attn."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.case import Case, Kernel
from cpcompile.runtime.kernels.flash import (
    Package,
    equal_dims,
    is_installed,
    limits_of,
    run_backward,
    run_forward,
)

Tensor = torch.Tensor


def _function(name: str) -> Any:
    return getattr(importlib.import_module("flash_attn.flash_attn_interface"), name)


def _terms(
    block: Block, is_causal: bool, scale: float, window_size_left: int = -1, window_size_right: int = -1
) -> dict[str, Any]:
    """Return the keywords that its functions share."""
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": is_causal,
        "window_size_left": window_size_left,
        "window_size_right": window_size_right,
        "softcap": block.softcap,
        "alibi_slopes": None,
    }


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    def call(
        q: Tensor, k: Tensor, v: Tensor, at: Tensor | None, _: Any, longest: int, *unused: Any, **window: Any
    ) -> Any:
        terms = _terms(block, unused[2], **window) | {"return_softmax": False}
        if at is None:
            return _function("_flash_attn_forward")(q, k, v, **terms)
        return _function("_flash_attn_varlen_forward")(q, k, v, at, at, longest, longest, **terms)

    return run_forward(call, q, k, v, block)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    def call(
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
        **window: Any,
    ) -> Any:
        is_deterministic = block.is_deterministic or torch.are_deterministic_algorithms_enabled()
        terms = _terms(block, unused[2], **window) | {"deterministic": is_deterministic}
        grads = tuple(map(torch.empty_like, (q, k, v)))
        if at is None:
            _function("_flash_attn_backward")(dout, q, k, v, out, lse, *grads, **terms)
        else:
            _function("_flash_attn_varlen_backward")(dout, q, k, v, out, lse, *grads, at, at, longest, longest, **terms)
        return grads

    return run_backward(call, dout, q, k, v, out, lse, block)


# Its ALiBi counts from the last key, a block of a ring from anywhere.
FLASH_ATTN = Kernel(
    "flash_attn",
    forward,
    backward,
    limits_of(256, Package("flash_attn.flash_attn_interface", "flash-attn")),
    frozenset(("causal", "window", "band", "lengths", "softcap", "deterministic")),
    equal_dims,
    is_cut_by_reach=True,
)


def _no_kernel(*args: Any) -> NoReturn:
    raise AssertionError("ring_flash_attn refuses every case")


def _ring_limits(case: Case) -> str:
    """Refuse: ring-flash-attn has rings but no kernels, its blocks are calls of flash-attn, which `flash_attn` makes alike."""
    hint = "" if is_installed("flash_attn.flash_attn_interface") else " (pip install flash-attn)"
    return f"has no kernels of its own, it calls those of flash_attn{hint}"


RING_FLASH_ATTN = Kernel("ring_flash_attn", _no_kernel, _no_kernel, _ring_limits, frozenset())
