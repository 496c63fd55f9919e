"""Extras: what a block says beside q, k, v and the scale, as the kernels written in Triton take it."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch

from cpcompile.runtime.kernels.block import Block, Dropout
from cpcompile.runtime.tokens.dropout import splitmix64

Tensor = torch.Tensor


class Extras(NamedTuple):
    """A field of None costs nothing in a kernel; strides are in elements. Triton 3.6 loses tuples within it.

    Attributes:
        low, high, slopes, distance: as in `Block`; bounds that bound nothing are None.
        prefix: int32 `[B]`.
        softcap: None if there is none.
        row_ids, column_ids: documents, `[B, Sq]` and `[B, Skv]`, and their batch strides.
        padding: uint8 `[B, Skv]`, not 0 where visible, and its batch stride.
        visible, bias: bool mask as uint8, or float mask, `[B, H, Sq, Skv]` with strides.
        key: int64 scalar, begins the stream of random numbers; its number p is that of the weight at place p.
        threshold: weights whose number is below are dropped.
        kept_scale: factor of the weights that are kept.
        place: that of weight (0, 0, 0, 0); `batch_places`, `head_places`, `row_places`: how far apart those of the next are.
    """

    low: int | None
    high: int | None
    prefix: Tensor | None
    softcap: float | None
    row_ids: Tensor | None
    row_ids_stride: int
    column_ids: Tensor | None
    column_ids_stride: int
    padding: Tensor | None
    padding_stride: int
    visible: Tensor | None
    bias: Tensor | None
    mask_batch_stride: int
    mask_head_stride: int
    mask_row_stride: int
    mask_column_stride: int
    slopes: Tensor | None
    distance: int
    key: Tensor | None
    threshold: int
    kept_scale: float
    place: int
    batch_places: int
    head_places: int
    row_places: int

    @property
    def is_plain(self) -> bool:
        """Whether scores are products with a factor, and hidden or not."""
        return self.softcap is None and self.bias is None and self.slopes is None


def extras_of(block: Block, q: Tensor, k: Tensor) -> Extras:
    """Return the extras of a block for `q` `[B, H, Sq, D]` and `k` `[B, K, Skv, D]`; waits for nothing on the device."""
    batch, heads, rows, columns = *q.shape[:3], k.shape[2]
    low, high = block.low, block.high
    if low is not None:
        low = None if low <= 1 - rows else min(low, columns)
    if high is not None:
        high = None if high >= columns - 1 else max(high, -rows)
    of_rows, of_columns = _documents(block, batch, columns, q.device)
    padding = None
    if block.key_padding is not None:
        padding = block.key_padding.expand(batch, columns).contiguous().view(torch.uint8)
    mask = None if block.mask is None else block.mask.expand(batch, heads, rows, columns)
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    is_bool = mask is not None and mask.dtype == torch.bool
    drop = block.dropout if block.dropout is not None and block.dropout.p > 0 else None
    place, batch_places, head_places, row_places = (0, 0, 0, 0) if drop is None else _places(drop)
    return Extras(
        low=low,
        high=high,
        prefix=_prefix(block.prefix, batch, columns) if high is not None else None,
        softcap=block.softcap or None,
        row_ids=of_rows,
        row_ids_stride=0 if of_rows is None else of_rows.stride(0),
        column_ids=of_columns,
        column_ids_stride=0 if of_columns is None else of_columns.stride(0),
        padding=padding,
        padding_stride=columns,
        visible=mask.view(torch.uint8) if mask is not None and is_bool else None,
        bias=None if is_bool else _in_range(mask),
        mask_batch_stride=strides[0],
        mask_head_stride=strides[1],
        mask_row_stride=strides[2],
        mask_column_stride=strides[3],
        slopes=None if block.slopes is None else block.slopes.float().contiguous(),
        distance=block.distance,
        key=None if drop is None else splitmix64(drop.seed, torch.full_like(drop.seed, drop.site)),
        threshold=0 if drop is None else int(drop.p * 2.0**64) - (1 << 63),
        kept_scale=1.0 if drop is None else 1 / (1 - drop.p),
        place=place,
        batch_places=batch_places,
        head_places=head_places,
        row_places=row_places,
    )


def dense_rows(x: Tensor) -> Tensor:
    """Return `x` with neighbours of the last dim side by side in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prefix(prefix: Tensor | None, batch: int, columns: int) -> Tensor | None:
    return None if prefix is None else prefix.clamp(0, columns).int().expand(batch).contiguous()


def _places(drop: Dropout) -> tuple[int, int, int, int]:
    of_head = drop.num_rows * drop.num_columns
    first = (drop.batch * drop.num_heads + drop.head) * of_head + drop.row * drop.num_columns + drop.column
    return first, drop.num_heads * of_head, of_head, drop.num_columns


def _in_range(bias: Tensor | None) -> Tensor | None:
    """Return a float64 mask within the range of float32: its smallest number must not become -inf, which hides."""
    if bias is None or bias.dtype != torch.float64:
        return bias
    largest = torch.finfo(torch.float32).max
    return torch.where(bias.isinf(), bias, bias.clamp(-largest, largest))


def _documents(block: Block, batch: int, columns: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Return the ids of rows and of columns: from `documents`, `lengths`, or both."""
    if not block.lengths:
        if block.documents is None:
            return None, None
        of_rows, of_columns = (dense_rows(ids).expand(batch, -1) for ids in block.documents)
        return of_rows, of_columns
    ids = _ids_of_lengths(block.lengths, columns, device).expand(batch, columns)
    if block.documents is None:
        return ids, ids
    of_rows, of_columns = (x.long() * len(block.lengths) + ids for x in block.documents)
    return of_rows, of_columns


def _ids_of_lengths(lengths: tuple[int, ...], columns: int, device: torch.device) -> Tensor:
    """Return int32 `[columns]`: which document a column is of."""
    # Copies from the host wait for the device; these numbers travel as arguments of a kernel.
    ends = torch.zeros(len(lengths), dtype=torch.int32, device=device)
    torch._foreach_add_(list(ends.unbind()), list(accumulate(lengths)))
    at = torch.arange(columns, dtype=torch.int32, device=device)
    return torch.bucketize(at, ends, right=True, out_int32=True)
