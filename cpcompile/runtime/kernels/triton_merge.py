"""`merge_` and `add_` of `cpcompile.runtime.kernels.merge` in Triton: one pass over memory instead of several."""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.triton_language import (
    LN_2,
    LOG2_E,
    Value,
    constexpr,
    has_triton,
    jit,
    on_device_of,
    tl,
)

Tensor = torch.Tensor
_ELEMENTS = 4096


def takes(*tensors: Tensor) -> bool:
    """Whether these kernels can compute on such tensors: on a GPU, of at most 32 bits."""
    return has_triton() and all(x.is_cuda and x.is_floating_point() and x.dtype.itemsize <= 4 for x in tensors)


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Merge a block into `out` `[B, H, S, D]` and `lse` `[B, H, S]` in place, in float32, rounded once; any strides."""
    batch, heads, rows, width = out.shape
    if not out.numel():
        return
    block_width, block_rows = _block(width)
    with on_device_of(out):
        merge_rows[(-(-rows // block_rows) * batch * heads,)](
            out,
            lse,
            block_out,
            block_lse,
            *out.stride(),
            *lse.stride(),
            *block_out.stride(),
            *block_lse.stride(),
            heads,
            rows,
            D=width,
            BLOCK_D=block_width,
            M=block_rows,
        )


def add_(total: Tensor, x: Tensor) -> None:
    """Add `x` to `total` in place, in float32, rounded once; any strides, at most four dims."""
    if not total.numel():
        return
    missing = (None,) * (4 - total.dim())
    total, x = total[missing], x.expand_as(total)[missing]
    batch, heads, rows, width = total.shape
    block_width, block_rows = _block(width)
    with on_device_of(total):
        add_rows[(-(-rows // block_rows) * batch * heads,)](
            total, x, *total.stride(), *x.stride(), heads, rows, width, BLOCK_D=block_width, M=block_rows
        )


def _block(width: int) -> tuple[int, int]:
    """Return the width and the number of the rows that a program takes."""
    block_width = 1 << (width - 1).bit_length()
    return block_width, max(1, _ELEMENTS // block_width)


@jit
def _at(
    x: Value,
    batch_stride: Value,
    head_stride: Value,
    row_stride: Value,
    b: Value,
    h: Value,
    i: Value,
) -> Value:
    """Return where the rows i of a head begin."""
    return x + b.to(tl.int64) * batch_stride + h.to(tl.int64) * head_stride + i.to(tl.int64) * row_stride


@jit
def merge_rows(
    out: Value,
    lse: Value,
    block_out: Value,
    block_lse: Value,
    out_batch: Value,
    out_head: Value,
    out_row: Value,
    out_column: Value,
    lse_batch: Value,
    lse_head: Value,
    lse_row: Value,
    block_out_batch: Value,
    block_out_head: Value,
    block_out_row: Value,
    block_out_column: Value,
    block_lse_batch: Value,
    block_lse_head: Value,
    block_lse_row: Value,
    num_heads: Value,
    num_rows: Value,
    D: constexpr,
    BLOCK_D: constexpr,
    M: constexpr,
) -> None:
    num_blocks = tl.cdiv(num_rows, M)
    head = tl.program_id(0) // num_blocks
    b = head // num_heads
    h = head % num_heads
    i = tl.program_id(0) % num_blocks * M + tl.arange(0, M)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = i < num_rows
    own_at = _at(lse, lse_batch, lse_head, lse_row, b, h, i)
    own = tl.load(own_at, mask=inside, other=0.0)
    added = tl.load(_at(block_lse, block_lse_batch, block_lse_head, block_lse_row, b, h, i), mask=inside, other=0.0)
    larger = tl.maximum(own, added)
    # Where neither side saw a key, -inf - -inf would be NaN; against 0 both weights are exp(-inf) = 0.
    larger = tl.where(larger == float("-inf"), 0.0, larger)
    own_weight = tl.exp2((own - larger) * LOG2_E)
    added_weight = tl.exp2((added - larger) * LOG2_E)
    weight = own_weight + added_weight
    # Each warp reads lse for itself: none may write it before the others have.
    tl.debug_barrier()
    tl.store(own_at, larger + tl.log2(weight) * LN_2, mask=inside)
    weight = tl.where(weight == 0, 1.0, weight)
    mask = inside[:, None] & (d < D)
    at = _at(out, out_batch, out_head, out_row, b, h, i)[:, None] + d * out_column
    block_at = _at(block_out, block_out_batch, block_out_head, block_out_row, b, h, i)[:, None] + d * block_out_column
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32) * (own_weight / weight)[:, None]
    x += tl.load(block_at, mask=mask, other=0.0).to(tl.float32) * (added_weight / weight)[:, None]
    tl.store(at, x.to(out.dtype.element_ty), mask=mask)


@jit
def add_rows(
    total: Value,
    x: Value,
    total_batch: Value,
    total_head: Value,
    total_row: Value,
    total_column: Value,
    x_batch: Value,
    x_head: Value,
    x_row: Value,
    x_column: Value,
    num_heads: Value,
    num_rows: Value,
    num_columns: Value,
    BLOCK_D: constexpr,
    M: constexpr,
) -> None:
    num_blocks = tl.cdiv(num_rows, M)
    head = tl.program_id(0) // num_blocks
    b = head // num_heads
    h = head % num_heads
    i = tl.program_id(0) % num_blocks * M + tl.arange(0, M)
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (i < num_rows)[:, None] & (d < num_columns)
    at = _at(total, total_batch, total_head, total_row, b, h, i)[:, None] + d * total_column
    x_at = _at(x, x_batch, x_head, x_row, b, h, i)[:, None] + d * x_column
    sums = tl.load(at, mask=mask, other=0.0).to(tl.float32) + tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, sums.to(total.dtype.element_ty), mask=mask)
