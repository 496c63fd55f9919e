"""Launch: what the kernels written in Triton are called with beside the extras of a block."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cpcompile.runtime.kernels.triton_extras import Extras

Tensor = torch.Tensor
# Of the GPUs that do not say.
_LEAST_SHARED = 64 << 10
# What kernels need beside operands: sums over rows, ids of documents.
_SPARE = 2 << 10


class Tiles(NamedTuple):
    """Sizes of blocks, and how the programs of a kernel run."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def fitted(tiles: Tiles, q: Tensor, v: Tensor, x: Extras, is_transposed: bool = False, num_kept: int = 1) -> Tiles:
    """Return tiles that fit into the shared memory of the device.

    Args:
        is_transposed: programs keep columns and walk rows, instead of the other way round.
        num_kept: operands `[block, D]` that a program keeps.
    """
    device = torch.cuda.get_device_properties(q.device) if q.is_cuda else None
    limit = getattr(device, "shared_memory_per_block_optin", _LEAST_SHARED)
    widths = padded(q.shape[3]) + padded(v.shape[3])
    of_mask = next((mask.element_size() for mask in (x.visible, x.bias) if mask is not None), 0)
    while True:
        kept, walked = (tiles.columns, tiles.rows) if is_transposed else (tiles.rows, tiles.columns)
        size = (kept * num_kept * widths // 2 + tiles.num_stages * walked * widths) * q.element_size() + _SPARE
        size += (tiles.num_stages - 1) * tiles.rows * tiles.columns * of_mask
        if size <= limit or max(kept, walked) <= 16:
            return tiles
        if tiles.num_stages > 2:
            tiles = tiles._replace(num_stages=2)
        elif tiles.columns >= tiles.rows:
            tiles = tiles._replace(columns=tiles.columns // 2)
        else:
            tiles = tiles._replace(rows=tiles.rows // 2)


def padded(width: int) -> int:
    """Return a head dim as tensor cores take it."""
    return max(16, 1 << (width - 1).bit_length())


def constants(q: Tensor, v: Tensor, x: Extras, scale: float) -> dict[str, bool | str | int]:
    """Return what the kernels are compiled for; products of float32 are made in full."""
    return {
        "IS_PLAIN": x.is_plain and scale > 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "D": q.shape[3],
        "DV": v.shape[3],
        "BLOCK_D": padded(q.shape[3]),
        "BLOCK_DV": padded(v.shape[3]),
    }


def with_strides(x: Tensor) -> tuple[Tensor | int, ...]:
    """Return a tensor `[B, H, S, D]` as kernels take it."""
    return x, *x.stride()[:3]


def like_rows(x: Tensor, width: int) -> Tensor:
    """Return an empty `[B, H, S, width]` in which heads and tokens are in the order of `x`."""
    batch, heads, rows = x.shape[:3]
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, rows, heads, width).transpose(1, 2)
    return x.new_empty(batch, heads, rows, width)
