"""Blocks for the kernels written in Triton, and their comparison with the math kernel in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpcompile.runtime.kernels import math as math_kernel
from cpcompile.runtime.kernels import triton_backward, triton_forward
from cpcompile.runtime.kernels.block import Block, Dropout
from cpcompile.runtime.kernels.merge import merge_
from cpcompile.runtime.kernels.triton_launch import Tiles
from tests.models import error

SCALE = 0.3
B, H, K = 2, 4, 2
# Attention rounds the weights and its results once each, and dq, dk, dv also their products. In float32 the formula itself is
# off by up to 2.5e-6 where head dims are wide: scores are large there, and their rounding is in the exponent.
LIMITS = {dtype: 4 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)} | {torch.float32: 4e-6}


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.3


def float_mask(rows: int, columns: int) -> Tensor:
    """Return a float mask with -inf, a row of it, a row of the smallest number there is, and one far below 0."""
    mask = torch.randn(B, 1, rows, columns).masked_fill(~bools(B, 1, rows, columns), -math.inf)
    mask[0, 0, 1] = -math.inf
    mask[1, 0, 3] = torch.finfo(mask.dtype).min
    mask[1, 0, rows // 2] -= 100
    return mask


def dropout() -> Dropout:
    return Dropout(0.4, torch.tensor(-77), 3, 1, 2, 9, 300, 200, 900000, 800000)


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625])


def lengths(size: int) -> tuple[int, ...]:
    return size // 3, 0, 1, size - size // 3 - size // 2 - 1, size // 2


Make = Callable[[int, int], dict[str, Any]]
BLOCKS: dict[str, Make] = {
    "plain": lambda r, c: {},
    "causal": lambda r, c: {"high": 0},
    "window": lambda r, c: {"low": -r // 5, "high": 0},
    "both sides": lambda r, c: {"low": -r // 6, "high": r // 7},
    "past": lambda r, c: {"high": -r // 3},
    "future": lambda r, c: {"low": r // 3},
    "nothing": lambda r, c: {"low": c},
    "negative scale": lambda r, c: {"scale": -SCALE, "high": 0},
    "mask": lambda r, c: {"mask": bools(B, 1, r, c).index_fill(2, torch.tensor([5]), False)},
    "mask of heads": lambda r, c: {"mask": bools(1, H, r, c), "high": r // 3},
    "mask of keys": lambda r, c: {"mask": bools(B, 1, 1, c)},
    "float mask": lambda r, c: {"mask": float_mask(r, c), "high": c // 2},
    "half of a float mask": lambda r, c: {"mask": float_mask(r, 2 * c)[..., ::2].bfloat16()},
    "documents": lambda r, c: {
        "documents": ((torch.arange(r) * 5 // r).expand(B, -1), (torch.arange(c) * 6 // c)[None]),
        "high": r // 9,
    },
    "documents in disorder": lambda r, c: {"documents": (torch.randint(3, (B, r)), torch.randint(4, (1, c)))},
    "few documents": lambda r, c: {
        "documents": ((torch.arange(r) * 3 // r).expand(B, -1) << 40, (torch.arange(c) * 3 // c)[None] << 40)
    },
    "key padding": lambda r, c: {"key_padding": torch.arange(c) >= torch.tensor([[c], [c // 3]]), "high": 9},
    "prefix": lambda r, c: {"prefix": torch.tensor([c // 2, -1]), "high": -5, "low": -r // 2},
    "long prefix": lambda r, c: {"prefix": torch.tensor([c - 1, 2]), "high": -r // 2},
    "alibi": lambda r, c: {"slopes": slopes(), "distance": 25, "high": 0},
    "softcap": lambda r, c: {"softcap": 2.0, "high": 0},
    "dropout": lambda r, c: {"dropout": dropout(), "high": r // 2},
    "everything": lambda r, c: {
        "low": -2 * r // 3,
        "high": 1,
        "mask": float_mask(r, c),
        "documents": (torch.arange(r)[None] * 2 // r, (torch.arange(c) * 2 // c)[None]),
        "key_padding": bools(1, c),
        "prefix": torch.tensor([c // 5]),
        "slopes": slopes(),
        "distance": 3,
        "softcap": 4.0,
        "dropout": dropout(),
    },
}
OF_LENGTHS: dict[str, Make] = {
    "lengths": lambda r, c: {"lengths": lengths(r)},
    "causal lengths": lambda r, c: {"lengths": lengths(r), "high": 0},
    "window in lengths": lambda r, c: {"lengths": lengths(r), "high": 0, "low": -r // 8},
    "lengths and documents": lambda r, c: {
        "lengths": lengths(r),
        "documents": (torch.arange(r)[None] // 7, torch.arange(r)[None] // 7),
    },
}


def to(x: Any, device: str) -> Any:
    """Return a field of a block on a device."""
    if isinstance(x, tuple):
        return tuple(to(part, device) for part in x)
    if isinstance(x, Dropout):
        fields = {name: getattr(x, name) for name in Dropout.__slots__}
        return Dropout(**fields | {"seed": x.seed.to(device)})
    return x.to(device) if isinstance(x, Tensor) else x


def tensors(
    rows: int, columns: int, width: int, value_width: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dout, q, k, v: rows of longer tensors `[B, S, H, D]`."""
    sizes = ((rows, H, value_width), (rows, H, width), (columns, K, width), (columns, K, value_width))
    made = [torch.randn(B, 3 + size, heads, dim).transpose(1, 2) for size, heads, dim in sizes]
    dout, q, k, v = (x.to(device, dtype)[:, :, 3:] for x in made)
    return dout, q, k, v


def check(
    name: str,
    rows: int,
    columns: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    device: str,
    tiles: Tiles | None = None,
) -> None:
    """Compare forward, and backward for an attention to these keys and to others."""
    torch.manual_seed(0)
    fields = {"scale": SCALE, **(BLOCKS | OF_LENGTHS)[name](rows, columns)}
    block = Block(**{field: to(x, device) for field, x in fields.items()})
    dout, q, k, v = tensors(rows, columns, width, value_width, dtype, device)
    wide = q.double(), k.double(), v.double()
    expected, expected_lse = math_kernel.forward(*wide, block)
    out, lse = triton_forward.forward(q, k, v, block, tiles)
    assert error(out.double(), expected) < LIMITS[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    assert not out[lse == -math.inf].any()
    # Other keys weigh as much as these, also where a float mask makes these weigh little.
    others_lse = torch.where(expected_lse < -50, expected_lse, 0) + torch.randn_like(expected_lse)
    merge_(expected, expected_lse, torch.randn_like(expected), others_lse)
    # What backward is given was rounded.
    expected, expected_lse = expected.to(dtype), expected_lse.float()
    both = None if tiles is None else (tiles, tiles)
    found = triton_backward.backward(dout, q, k, v, expected, expected_lse, block, both)
    truth = math_kernel.backward(dout.double(), *wide, expected.double(), expected_lse.double(), block)
    for which, x, of_truth in zip(("dq", "dk", "dv"), found, truth, strict=True):
        assert x.dtype == dtype
        assert error(x.double(), of_truth) < LIMITS[dtype], which
