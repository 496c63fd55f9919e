"""Bounds: which blocks of columns a block of rows may see, and the other way round.

Blocks are numbered. A range of them is (start, whole_start, whole_stop, stop): nothing outside start..stop is seen, and
whole_start..whole_stop is seen wholly, but for what a dense mask hides.
"""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.triton_extras import Extras
from cpcompile.runtime.kernels.triton_language import Value, constant, constexpr, jit, tl

Tensor = torch.Tensor
_FAR = constant(1 << 30)
_SMALLEST = constant(-(1 << 63))
_LARGEST = constant((1 << 63) - 1)
_BLOCKS_AT_ONCE = 256


def hulls(x: Extras, q: Tensor, k: Tensor, rows: int, columns: int, is_backward: bool = False) -> Tensor | None:
    """Return int32 `[B, blocks, 4]`: the range of each block of rows by documents and key padding, or None without them.

    Args:
        rows, columns: sizes of the blocks.
        is_backward: the ranges of rows for each block of columns.
    """
    if x.row_ids is None and x.padding is None:
        return None
    batch = q.shape[0]
    of_rows = _spans(x.row_ids, x.row_ids_stride, None, 0, batch, q.shape[2], rows, q.device)
    of_columns = _spans(
        x.column_ids, x.column_ids_stride, x.padding, x.padding_stride, batch, k.shape[2], columns, q.device
    )
    own, others = (of_columns, of_rows) if is_backward else (of_rows, of_columns)
    out = torch.empty(batch, own.shape[1], 4, dtype=torch.int32, device=q.device)
    write_hulls[(own.shape[1], batch)](own, others, out, own.shape[1], others.shape[1], CHUNK=_BLOCKS_AT_ONCE)
    return out


def _spans(
    ids: Tensor | None,
    ids_stride: int,
    padding: Tensor | None,
    padding_stride: int,
    batch: int,
    size: int,
    block: int,
    device: torch.device,
) -> Tensor:
    """Return int64 `[B, blocks, 3]`: smallest and largest visible id, and whether all are visible and the same."""
    out = torch.empty(batch, -(-size // block), 3, dtype=torch.int64, device=device)
    write_spans[(out.shape[1], batch)](ids, ids_stride, padding, padding_stride, out, size, out.shape[1], BLOCK=block)
    return out


@jit
def write_spans(
    ids: Value,
    ids_stride: Value,
    padding: Value,
    padding_stride: Value,
    out: Value,
    size: Value,
    num_blocks: Value,
    BLOCK: constexpr,
) -> None:
    block = tl.program_id(0)
    b = tl.program_id(1)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    seen = inside
    if padding is not None:
        seen = seen & (tl.load(padding + tl.cast(b, tl.int64) * padding_stride + i, mask=inside, other=0) != 0)
    if ids is not None:
        own = tl.load(ids + tl.cast(b, tl.int64) * ids_stride + i, mask=inside, other=0).to(tl.int64)
    else:
        own = tl.zeros([BLOCK], tl.int64)
    smallest = tl.min(tl.where(seen, own, _LARGEST), 0)
    largest = tl.max(tl.where(seen, own, _SMALLEST), 0)
    num_hidden = tl.sum((inside & (seen == 0)).to(tl.int32), 0)
    at = out + (b * num_blocks + block) * 3
    tl.store(at, smallest)
    tl.store(at + 1, largest)
    tl.store(at + 2, ((num_hidden == 0) & (smallest == largest)).to(tl.int64))


@jit
def write_hulls(own: Value, others: Value, out: Value, num_own: Value, num_others: Value, CHUNK: constexpr) -> None:
    block = tl.program_id(0)
    b = tl.program_id(1)
    at = own + (b * num_own + block) * 3
    smallest = tl.load(at)
    largest = tl.load(at + 1)
    is_uniform = tl.load(at + 2)
    start = tl.full([], _FAR, tl.int32)
    stop = tl.full([], 0, tl.int32)
    whole_start = tl.full([], _FAR, tl.int32)
    whole_stop = tl.full([], _FAR, tl.int32)
    for first in range(0, num_others, CHUNK):
        n = first + tl.arange(0, CHUNK)
        inside = n < num_others
        spans = others + (b * num_others + n) * 3
        lower = tl.load(spans, mask=inside, other=_LARGEST)
        upper = tl.load(spans + 1, mask=inside, other=_SMALLEST)
        uniform = tl.load(spans + 2, mask=inside, other=0)
        meets = (lower <= upper) & (lower <= largest) & (smallest <= upper)
        whole = (uniform != 0) & (is_uniform != 0) & (lower == smallest)
        start = tl.minimum(start, tl.min(tl.where(meets, n, _FAR), 0))
        stop = tl.maximum(stop, tl.max(tl.where(meets, n + 1, 0), 0))
        whole_start = tl.minimum(whole_start, tl.min(tl.where(whole, n, _FAR), 0))
        whole_stop = tl.minimum(whole_stop, tl.min(tl.where((whole == 0) & (n > whole_start), n, _FAR), 0))
    at = out + (b * num_own + block) * 4
    tl.store(at, tl.minimum(start, stop))
    tl.store(at + 1, whole_start)
    tl.store(at + 2, tl.minimum(whole_stop, num_others))
    tl.store(at + 3, stop)


@jit
def _within(
    start: Value, whole_start: Value, whole_stop: Value, stop: Value, b: Value, block: Value, num: Value, hulls: Value
) -> Value:
    """Return the range within the hull of `block`, one of `num`, in order."""
    if hulls is not None:
        at = hulls + (b * num + block) * 4
        start = tl.maximum(start, tl.load(at))
        whole_start = tl.maximum(whole_start, tl.load(at + 1))
        whole_stop = tl.minimum(whole_stop, tl.load(at + 2))
        stop = tl.minimum(stop, tl.load(at + 3))
    stop = tl.maximum(start, stop)
    whole_start = tl.minimum(tl.maximum(whole_start, start), stop)
    whole_stop = tl.maximum(tl.minimum(whole_stop, stop), whole_start)
    return start, whole_start, whole_stop, stop


@jit
def columns_of(
    block: Value,
    b: Value,
    num_rows: Value,
    num_columns: Value,
    x: Value,
    hulls: Value,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> Value:
    """Return the range of blocks of columns that a block of rows sees."""
    row = block * ROWS
    last_row = tl.minimum(row + ROWS, num_rows) - 1
    start = row * 0
    whole_start = row * 0
    stop = row * 0 + num_columns
    whole_stop = stop
    if x.high is not None:
        stop = last_row + x.high + 1
        whole_stop = row + x.high + 1
        if x.prefix is not None:
            prefix = tl.load(x.prefix + b)
            stop = tl.maximum(stop, prefix)
            whole_stop = tl.maximum(whole_stop, prefix)
        stop = tl.maximum(tl.minimum(stop, num_columns), 0)
        whole_stop = tl.maximum(tl.minimum(whole_stop, num_columns), 0)
    if x.low is not None:
        start = tl.maximum(row + x.low, 0)
        whole_start = tl.maximum(last_row + x.low, 0)
    return _within(
        start // COLUMNS,
        tl.cdiv(whole_start, COLUMNS),
        whole_stop // COLUMNS,
        tl.cdiv(stop, COLUMNS),
        b,
        block,
        tl.cdiv(num_rows, ROWS),
        hulls,
    )


@jit
def rows_of(
    block: Value,
    b: Value,
    num_rows: Value,
    num_columns: Value,
    x: Value,
    hulls: Value,
    ROWS: constexpr,
    COLUMNS: constexpr,
) -> Value:
    """Return the range of blocks of rows that see a block of columns; a last block of fewer rows may be whole."""
    column = block * COLUMNS
    last_column = tl.minimum(column + COLUMNS, num_columns) - 1
    start = column * 0
    whole_start = column * 0
    stop = column * 0 + num_rows
    whole_stop = stop
    if x.high is not None:
        start = tl.maximum(column - x.high, 0)
        whole_start = tl.maximum(last_column - x.high, 0)
        if x.prefix is not None:
            prefix = tl.load(x.prefix + b)
            start = tl.where(column < prefix, 0, start)
            whole_start = tl.where(last_column < prefix, 0, whole_start)
    if x.low is not None:
        stop = tl.maximum(tl.minimum(last_column - x.low + 1, num_rows), 0)
        whole_stop = tl.maximum(column - x.low + 1, 0)
    return _within(
        start // ROWS,
        tl.cdiv(whole_start, ROWS),
        tl.where(whole_stop >= num_rows, tl.cdiv(num_rows, ROWS), whole_stop // ROWS),
        tl.cdiv(stop, ROWS),
        b,
        block,
        tl.cdiv(num_columns, COLUMNS),
        hulls,
    )
