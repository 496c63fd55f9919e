"""Backward of the attention kernel in Triton: one kernel walks rows for dk and dv, another walks columns for dq.

Sums are taken in one order, without atomics: the same bits at each run. What a weight was follows from out and lse.
"""

from __future__ import annotations

import torch

from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.kernels.triton_bounds import columns_of, hulls, rows_of
from cpcompile.runtime.kernels.triton_extras import dense_rows, extras_of
from cpcompile.runtime.kernels.triton_forward import walk
from cpcompile.runtime.kernels.triton_language import LN_2, LOG2_E, Value, constant, constexpr, jit, on_device_of, tl
from cpcompile.runtime.kernels.triton_launch import Tiles, constants, fitted, like_rows, padded, with_strides
from cpcompile.runtime.kernels.triton_scores import biased, capped, head_of, hidden, is_kept, load_rows, store_rows

Tensor = torch.Tensor
# Of magnitudes below, lse in float32 says all that matters of a row's sum.
_LARGE = constant(64.0)
_ROUNDING = constant(2.0**-21)


def query_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Return what is fast on an H100 for dq with heads of `width`, a power of two."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if width <= 128 else Tiles(32, 16, 4, 2)
    if width <= 128:
        return Tiles(128, 64, 8, 3 if width <= 64 else 2)
    return Tiles(128, 32, 8, 2)


def key_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """Return what is fast on an H100 for dk and dv with heads of `width`, a power of two."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 2) if width <= 64 else Tiles(16, 32, 4, 2) if width <= 128 else Tiles(16, 16, 4, 2)
    return Tiles(64, 128, 8, 2) if width <= 128 else Tiles(32, 64, 8, 2)


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block: Block,
    tiles: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of these keys, for `out` and `lse` over all keys; `tiles` are those of dq and of dk and dv."""
    batch, heads, rows, width = q.shape
    columns, value_width = v.shape[2:]
    dout, q, k, v, out = map(dense_rows, (dout, q, k, v, out))
    grads = like_rows(q, width), like_rows(k, width), like_rows(v, value_width)
    if not lse.numel() or not columns:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    with on_device_of(q):
        x = extras_of(block, q, k)
        widest = padded(max(width, value_width))
        for_queries, for_keys = tiles or (
            fitted(query_tiles(q.dtype, widest), q, v, x, num_kept=2),
            fitted(key_tiles(q.dtype, widest), q, v, x, num_kept=2, is_transposed=True),
        )
        settings = constants(q, v, x, block.scale)
        base, delta = (torch.empty(batch, heads, rows, dtype=torch.float32, device=q.device) for _ in range(2))
        shares = None if x.bias is None else torch.empty_like(base)
        operands = [with_strides(x) for x in (dout, q, k, v)]
        sizes = heads, heads // k.shape[1], rows, columns, block.scale
        differentiate_queries[(-(-rows // for_queries.rows) * batch * heads,)](
            *operands,
            with_strides(out),
            lse,
            lse.stride(),
            base,
            delta,
            shares,
            with_strides(grads[0]),
            hulls(x, q, k, for_queries.rows, for_queries.columns),
            *sizes,
            x,
            M=for_queries.rows,
            N=for_queries.columns,
            num_warps=for_queries.num_warps,
            num_stages=for_queries.num_stages,
            **settings,
        )
        differentiate_keys[(-(-columns // for_keys.columns) * batch * k.shape[1],)](
            *operands,
            base,
            delta,
            shares,
            with_strides(grads[1]),
            with_strides(grads[2]),
            hulls(x, q, k, for_keys.rows, for_keys.columns, is_backward=True),
            *sizes,
            x,
            M=for_keys.rows,
            N=for_keys.columns,
            num_warps=for_keys.num_warps,
            num_stages=for_keys.num_stages,
            **settings,
        )
    return grads


@jit
def differentiate_queries(
    dout: Value,
    q: Value,
    k: Value,
    v: Value,
    out: Value,
    lse: Value,
    lse_strides: Value,
    base: Value,
    delta: Value,
    shares: Value,
    dq: Value,
    hulls: Value,
    num_heads: Value,
    group: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    M: constexpr,
    N: constexpr,
    IS_PLAIN: constexpr,
    PRECISION: constexpr,
    D: constexpr,
    DV: constexpr,
    BLOCK_D: constexpr,
    BLOCK_DV: constexpr,
) -> None:
    """Write dq, and what the weights of a row are computed from: base, delta and shares, `[B, H, Sq]`."""
    num_blocks = tl.cdiv(num_rows, M)
    block = num_blocks - 1 - tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    b = head // num_heads
    h = head % num_heads
    first = block * M
    i = first + tl.arange(0, M)
    inside = i < num_rows
    start, whole_start, whole_stop, stop = columns_of(block, b, num_rows, num_columns, x, hulls, M, N)
    q_rows = load_rows(head_of(q, b, h), first, q[3], num_rows, False, M, D, BLOCK_D)
    dout_rows = load_rows(head_of(dout, b, h), first, dout[3], num_rows, False, M, DV, BLOCK_DV)
    out_rows = load_rows(head_of(out, b, h), first, out[3], num_rows, False, M, DV, BLOCK_DV)
    delta_of_rows = tl.sum(dout_rows.to(tl.float32) * out_rows.to(tl.float32), 1)
    lse += tl.cast(b, tl.int64) * lse_strides[0] + tl.cast(h, tl.int64) * lse_strides[1]
    sums = tl.load(lse + i * lse_strides[2], mask=inside, other=float("-inf"))
    at = head.to(tl.int64) * num_rows + i
    if x.bias is not None:
        sums, share = _fresh_sums(
            q_rows, k, i, b, h, group, sums, num_rows, num_columns, scale, x, start, stop, PRECISION, D, BLOCK_D, M, N
        )
        tl.store(shares + at, share, mask=inside)
    base_of_rows = tl.where(sums == float("-inf"), float("inf"), sums)
    if IS_PLAIN:
        base_of_rows *= LOG2_E
    tl.store(base + at, base_of_rows, mask=inside)
    tl.store(delta + at, delta_of_rows, mask=inside)
    acc = tl.zeros([M, BLOCK_D], tl.float32)
    for IS_WHOLE in tl.static_range(1, -1, -1):
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
            column = (t + tl.where(t < before, shift_before, shift_after)) * N
            j = column + tl.arange(0, N)[None, :]
            k_rows = load_rows(head_of(k, b, h // group), column, k[3], num_columns, IS_WHOLE, N, D, BLOCK_D)
            v_rows = load_rows(head_of(v, b, h // group), column, v[3], num_columns, IS_WHOLE, N, DV, BLOCK_DV)
            products = tl.dot(q_rows, tl.trans(k_rows), input_precision=PRECISION)
            dp = tl.dot(dout_rows, tl.trans(v_rows), input_precision=PRECISION)
            p, slope = weights(
                products,
                i[:, None],
                j,
                b,
                h,
                base_of_rows[:, None],
                num_rows,
                num_columns,
                scale,
                x,
                IS_WHOLE,
                IS_PLAIN,
            )
            if x.bias is not None:
                p *= share[:, None]
            if x.key is not None:
                dp = tl.where(is_kept(i[:, None], j, b, h, x), dp * x.kept_scale, 0.0)
            ds = p * (dp - delta_of_rows[:, None]) * slope
            acc = tl.dot(ds.to(k_rows.dtype), k_rows, acc, input_precision=PRECISION)
    store_rows(head_of(dq, b, h), acc * scale, first, dq[3], num_rows, M, D, BLOCK_D)


@jit
def _fresh_sums(
    q: Value,
    k: Value,
    i: Value,
    b: Value,
    h: Value,
    group: Value,
    sums: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    start: Value,
    stop: Value,
    PRECISION: constexpr,
    D: constexpr,
    BLOCK_D: constexpr,
    M: constexpr,
    N: constexpr,
) -> Value:
    """Return (base, share) of rows: weights are `exp(score - base) * share`.

    A float mask may hold finfo.min: then lse = min + log(n) rounds to min, and exp(score - lse) is 1 instead of 1/n. Such
    rows take the softmax of these columns afresh, times the share of these columns in all. A share that differs from 1 by
    no more than lse is rounded is 1.
    """
    is_large = (sums < -_LARGE) & (sums > float("-inf"))
    last = tl.where(tl.max(is_large.to(tl.int32), 0) > 0, stop, start)
    m = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    m, m, total = walk(
        m,
        m,
        total,
        q,
        k,
        None,
        i[:, None],
        b,
        h,
        group,
        num_rows,
        num_columns,
        scale,
        x,
        start,
        start,
        start,
        last,
        False,
        False,
        PRECISION,
        D,
        D,
        BLOCK_D,
        BLOCK_D,
        N,
    )
    is_fresh = is_large & (total > 0)
    total = tl.where(is_fresh, total, 1.0)
    gap = tl.where(is_fresh, m, 0.0) + tl.log2(total) * LN_2 - tl.where(is_fresh, sums, 0.0)
    gap = tl.where(tl.abs(gap) <= tl.abs(sums) * _ROUNDING, 0.0, gap)
    return tl.where(is_fresh, m, sums), tl.exp2(gap * LOG2_E) / total


@jit
def weights(
    products: Value,
    i: Value,
    j: Value,
    b: Value,
    h: Value,
    base: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    IS_WHOLE: constexpr,
    IS_PLAIN: constexpr,
) -> Value:
    """Return (softmax weights but for the share, d scores / d products without `scale`)."""
    if IS_PLAIN:
        s = hidden(products, i, j, b, h, num_rows, num_columns, x, IS_WHOLE)
        return tl.exp2(s * (scale * LOG2_E) - base), 1.0
    before = capped(products * scale, x)
    s = biased(before, i, j, b, h, num_rows, num_columns, x)
    s = hidden(s, i, j, b, h, num_rows, num_columns, x, IS_WHOLE)
    slope = 1.0
    if x.softcap is not None:
        slope = 1 - (before / x.softcap) * (before / x.softcap)
    return tl.exp2((s - base) * LOG2_E), slope


@jit
def differentiate_keys(
    dout: Value,
    q: Value,
    k: Value,
    v: Value,
    base: Value,
    delta: Value,
    shares: Value,
    dk: Value,
    dv: Value,
    hulls: Value,
    num_heads: Value,
    group: Value,
    num_rows: Value,
    num_columns: Value,
    scale: Value,
    x: Value,
    M: constexpr,
    N: constexpr,
    IS_PLAIN: constexpr,
    PRECISION: constexpr,
    D: constexpr,
    DV: constexpr,
    BLOCK_D: constexpr,
    BLOCK_DV: constexpr,
) -> None:
    """Write dk and dv; scores are transposed, `[N, M]`."""
    num_blocks = tl.cdiv(num_columns, N)
    # The first columns are seen by most rows of a causal attention: long programs first.
    block = tl.program_id(0) % num_blocks
    head = tl.program_id(0) // num_blocks
    b = head // (num_heads // group)
    h_of_keys = head % (num_heads // group)
    column = block * N
    j = column + tl.arange(0, N)[:, None]
    start, whole_start, whole_stop, stop = rows_of(block, b, num_rows, num_columns, x, hulls, M, N)
    k_rows = load_rows(head_of(k, b, h_of_keys), column, k[3], num_columns, False, N, D, BLOCK_D)
    v_rows = load_rows(head_of(v, b, h_of_keys), column, v[3], num_columns, False, N, DV, BLOCK_DV)
    dk_sum = tl.zeros([N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([N, BLOCK_DV], tl.float32)
    for IS_WHOLE in tl.static_range(1, -1, -1):
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
        # All query heads of the group in one loop: it is filled and drained once.
        for step in range(count * group):
            # A pipelined loop computes its first addresses even if it has no step.
            h = h_of_keys * group + step // tl.maximum(count, 1)
            t = step % tl.maximum(count, 1)
            first = (t + tl.where(t < before, shift_before, shift_after)) * M
            i = first + tl.arange(0, M)
            inside = i < num_rows
            at = (tl.cast(b, tl.int64) * num_heads + h) * num_rows + i
            q_rows = load_rows(head_of(q, b, h), first, q[3], num_rows, False, M, D, BLOCK_D)
            dout_rows = load_rows(head_of(dout, b, h), first, dout[3], num_rows, False, M, DV, BLOCK_DV)
            # Rows outside have the weight 0.
            base_of_rows = tl.load(base + at, mask=inside, other=float("inf"))
            delta_of_rows = tl.load(delta + at, mask=inside, other=0.0)
            products = tl.dot(k_rows, tl.trans(q_rows), input_precision=PRECISION)
            p, slope = weights(
                products,
                i[None, :],
                j,
                b,
                h,
                base_of_rows[None, :],
                num_rows,
                num_columns,
                scale,
                x,
                IS_WHOLE,
                IS_PLAIN,
            )
            if x.bias is not None:
                p *= tl.load(shares + at, mask=inside, other=0.0)[None, :]
            dp = tl.dot(v_rows, tl.trans(dout_rows), input_precision=PRECISION)
            kept_p = p
            if x.key is not None:
                kept = is_kept(i[None, :], j, b, h, x)
                kept_p = tl.where(kept, p * x.kept_scale, 0.0)
                dp = tl.where(kept, dp * x.kept_scale, 0.0)
            dv_sum = tl.dot(kept_p.to(dout_rows.dtype), dout_rows, dv_sum, input_precision=PRECISION)
            ds = p * (dp - delta_of_rows[None, :]) * slope
            dk_sum = tl.dot(ds.to(q_rows.dtype), q_rows, dk_sum, input_precision=PRECISION)
    store_rows(head_of(dk, b, h_of_keys), dk_sum * scale, column, dk[3], num_columns, N, D, BLOCK_D)
    store_rows(head_of(dv, b, h_of_keys), dv_sum, column, dv[3], num_columns, N, DV, BLOCK_DV)
