"""Forward of the attention kernel in Triton: one program a block of rows of a head walks the columns it sees.

FlashAttention-2 (Dao, 2023), for every case of `Block`. Blocks of columns that are seen wholly go first, without the
arithmetic of masks. M rows and N columns of a block, D and DV head dims, padded to powers of two.
"""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.triton_bounds import columns_of, hulls
from cpcompile.runtime.kernels.triton_extras import dense_rows, extras_of
from cpcompile.runtime.kernels.triton_language import LN_2, LOG2_E, Value, constexpr, jit, on_device_of, tl
from cpcompile.runtime.kernels.triton_launch import Tiles, constants, fitted, like_rows, padded, with_strides
from cpcompile.runtime.kernels.triton_scores import biased, capped, head_of, hidden, is_kept, load_rows, store_rows

Tensor = torch.Tensor


def forward_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Return what is fast on an H100 for heads of `width`, a power of two."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if width <= 128 else Tiles(32, 16, 4, 2)
    if width <= 64:
        return Tiles(128, 64, 4, 3)
    return Tiles(128, 128, 8, 2) if width <= 128 else Tiles(128, 64, 8, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, block: Block, tiles: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """Return (out `[B, H, Sq, DV]`, lse float32 `[B, H, Sq]`); a row that sees no key gives 0 and -inf."""
    batch, heads, rows, width = q.shape
    q, k, v = map(dense_rows, (q, k, v))
    out = like_rows(q, v.shape[3])
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    if not lse.numel():
        return out, lse
    with on_device_of(q):
        x = extras_of(block, q, k)
        tiles = tiles or fitted(forward_tiles(q.dtype, padded(max(width, v.shape[3]))), q, v, x)
        attend[(-(-rows // tiles.rows) * batch * heads,)](
            with_strides(q),
            with_strides(k),
            with_strides(v),
            with_strides(out),
            lse,
            hulls(x, q, k, tiles.rows, tiles.columns),
            heads,
            heads // k.shape[1],
            rows,
            k.shape[2],
            block.scale,
            x,
            M=tiles.rows,
            N=tiles.columns,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **constants(q, v, x, block.scale),
        )
    return out, lse


@jit
def attend(
    q: Value,
    k: Value,
    v: Value,
    out: Value,
    lse: Value,
    hulls: Value,
    num_heads: Value,
    group: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    IS_PLAIN: constexpr,
    PRECISION: constexpr,
    D: constexpr,
    DV: constexpr,
    BLOCK_D: constexpr,
    BLOCK_DV: constexpr,
    M: constexpr,
    N: constexpr,
) -> None:
    num_blocks = tl.cdiv(num_rows, M)
    # The last rows see most of a causal attention: long programs first.
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    b = head // num_heads
    h = head % num_heads
    first = block * M
    i = first + tl.arange(0, M)
    q_rows = load_rows(head_of(q, b, h), first, q[3], num_rows, False, M, D, BLOCK_D)
    start, whole_start, whole_stop, stop = columns_of(block, b, num_rows, num_columns, x, hulls, M, N)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, BLOCK_DV], tl.float32)
    for IS_WHOLE in tl.static_range(1, -1, -1):
        acc, m, total = walk(
            acc,
            m,
            total,
            q_rows,
            k,
            v,
            i[:, None],
            b,
            h,
            group,
            num_rows,
            num_columns,
            scale,
            x,
            start,
            whole_start,
            whole_stop,
            stop,
            IS_WHOLE,
            IS_PLAIN,
            PRECISION,
            D,
            DV,
            BLOCK_D,
            BLOCK_DV,
            N,
        )
    if x.key is not None:
        acc *= x.kept_scale
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_rows(head_of(out, b, h), acc, first, out[3], num_rows, M, DV, BLOCK_DV)
    if IS_PLAIN:
        m *= LN_2
    tl.store(lse + head.to(tl.int64) * num_rows + i, m + tl.log2(total) * LN_2, mask=i < num_rows)


@jit
def walk(
    acc: Value,
    m: Value,
    total: Value,
    q: Value,
    k: Value,
    v: Value,
    i: Value,
    b: Value,
    h: Value,
    group: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    start: Value,
    whole_start: Value,
    whole_stop: Value,
    stop: Value,
    IS_WHOLE: constexpr,
    IS_PLAIN: constexpr,
    PRECISION: constexpr,
    D: constexpr,
    DV: constexpr,
    BLOCK_D: constexpr,
    BLOCK_DV: constexpr,
    N: constexpr,
) -> Value:
    """Return (weighted sum of values, largest score, sum of weights) after the columns seen wholly, or after the others.

    Scores are in units of log 2 if `IS_PLAIN`. A float mask may hold the smallest number there is: it has no such multiple.
    """
    if IS_WHOLE:
        before = whole_stop - whole_start
        count = before
        shift_before = whole_start
        shift_after = whole_start
    else:
        before = whole_start - start
        count = before + stop - whole_stop
        shift_before = start
        shift_after = whole_stop - before
    for t in range(count):
        first = (t + tl.where(t < before, shift_before, shift_after)) * N
        j = first + tl.arange(0, N)[None, :]
        k_rows = load_rows(head_of(k, b, h // group), first, k[3], num_columns, IS_WHOLE, N, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k_rows), input_precision=PRECISION)
        if IS_PLAIN:
            s = hidden(s, i, j, b, h, num_rows, num_columns, x, IS_WHOLE)
            larger = tl.maximum(m, tl.max(s, 1) * (scale * LOG2_E))
        else:
            s = biased(capped(s * scale, x), i, j, b, h, num_rows, num_columns, x)
            s = hidden(s, i, j, b, h, num_rows, num_columns, x, IS_WHOLE)
            larger = tl.maximum(m, tl.max(s, 1))
        base = larger
        if not IS_WHOLE or x.visible is not None or x.bias is not None:
            base = tl.where(larger == float("-inf"), 0.0, larger)
        if IS_PLAIN:
            p = tl.exp2(s * (scale * LOG2_E) - base[:, None])
            fade = tl.exp2(m - base)
        else:
            p = tl.exp2((s - base[:, None]) * LOG2_E)
            fade = tl.exp2((m - base) * LOG2_E)
        total = total * fade + tl.sum(p, 1)
        m = larger
        if v is not None:
            if x.key is not None:
                p = tl.where(is_kept(i, j, b, h, x), p, 0.0)
            v_rows = load_rows(head_of(v, b, h // group), first, v[3], num_columns, IS_WHOLE, N, DV, BLOCK_DV)
            acc = tl.dot(p.to(v_rows.dtype), v_rows, acc * fade[:, None], input_precision=PRECISION)
    return acc, m, total
