"""What the kernels of forward and backward share: loads, scores, and what hides them.

Row i and column j come as `[M, 1]` and `[1, N]`, or as `[1, M]` and `[N, 1]`, and scores as `[M, N]` or `[N, M]`.
"""

from __future__ import annotations

from cpcompile.runtime.kernels.triton_language import LOG2_E, Value, constant, constexpr, jit, tl

_GAMMA = constant(0x9E3779B97F4A7C15)
_FACTOR_1 = constant(0xBF58476D1CE4E5B9)
_FACTOR_2 = constant(0x94D049BB133111EB)


@jit
def head_of(x: Value, b: Value, h: Value) -> Value:
    """Return where the rows of a head begin; x is a tensor `[B, H, S, D]` and its first three strides."""
    return x[0] + tl.cast(b, tl.int64) * x[1] + tl.cast(h, tl.int64) * x[2]


@jit
def load_rows(
    x: Value,
    first: Value,
    stride: Value,
    num_rows: Value,
    IS_INSIDE: constexpr,
    ROWS: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> Value:
    """Return rows `first` to `first + ROWS` of x, `[ROWS, BLOCK_WIDTH]`, 0 outside."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    at = x + tl.cast(first, tl.int64) * stride + row * stride + column
    if IS_INSIDE:
        if WIDTH == BLOCK_WIDTH:
            return tl.load(at)
        return tl.load(at, mask=column < WIDTH, other=0.0)
    return tl.load(at, mask=(first + row < num_rows) & (column < WIDTH), other=0.0)


@jit
def store_rows(
    x: Value,
    value: Value,
    first: Value,
    stride: Value,
    num_rows: Value,
    ROWS: constexpr,
    WIDTH: constexpr,
    BLOCK_WIDTH: constexpr,
) -> None:
    """Write `[ROWS, BLOCK_WIDTH]` to rows `first` to `first + ROWS` of x, in its dtype."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    at = x + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(at, value.to(x.dtype.element_ty), mask=(first + row < num_rows) & (column < WIDTH))


@jit
def capped(s: Value, x: Value) -> Value:
    """Return scores after `softcap`."""
    if x.softcap is not None:
        s = x.softcap * _tanh(s / x.softcap)
    return s


@jit
def _tanh(x: Value) -> Value:
    e = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
    far = (1 - e) / (1 + e)
    square = x * x
    near = 2 / 15 + square * (-17 / 315 + square * (62 / 2835))
    near = x * (1 + square * (-1 / 3 + square * near))
    # 1 - e loses the digits of small numbers.
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@jit
def biased(s: Value, i: Value, j: Value, b: Value, h: Value, num_rows: Value, num_columns: Value, x: Value) -> Value:
    """Return scores with ALiBi and the float mask added."""
    if x.slopes is not None:
        s -= tl.load(x.slopes + h) * tl.abs(i - j + x.distance).to(tl.float32)
    if x.bias is not None:
        inside = (i < num_rows) & (j < num_columns)
        s += tl.load(_in_mask(x.bias, i, j, b, h, x), mask=inside, other=float("-inf")).to(tl.float32)
    return s


@jit
def hidden(
    s: Value,
    i: Value,
    j: Value,
    b: Value,
    h: Value,
    num_rows: Value,
    num_columns: Value,
    x: Value,
    IS_WHOLE: constexpr,
) -> Value:
    """Return scores, -inf where hidden; `IS_WHOLE`: only the bool mask may hide."""
    if not IS_WHOLE:
        seen = (j < num_columns) & (i < num_rows)
        if x.high is not None:
            below = j - i <= x.high
            if x.prefix is not None:
                below = below | (j < tl.load(x.prefix + b))
            seen = seen & below
        if x.low is not None:
            seen = seen & (j - i >= x.low)
        if x.row_ids is not None:
            of_rows = tl.load(x.row_ids + tl.cast(b, tl.int64) * x.row_ids_stride + i, mask=i < num_rows, other=0)
            at = x.column_ids + tl.cast(b, tl.int64) * x.column_ids_stride + j
            seen = seen & (of_rows == tl.load(at, mask=j < num_columns, other=0))
        if x.padding is not None:
            at = x.padding + tl.cast(b, tl.int64) * x.padding_stride + j
            seen = seen & (tl.load(at, mask=j < num_columns, other=0) != 0)
        s = tl.where(seen, s, float("-inf"))
    if x.visible is not None:
        inside = (i < num_rows) & (j < num_columns)
        s = tl.where(tl.load(_in_mask(x.visible, i, j, b, h, x), mask=inside, other=0) != 0, s, float("-inf"))
    return s


@jit
def _in_mask(mask: Value, i: Value, j: Value, b: Value, h: Value, x: Value) -> Value:
    head = tl.cast(b, tl.int64) * x.mask_batch_stride + tl.cast(h, tl.int64) * x.mask_head_stride
    return mask + head + i.to(tl.int64) * x.mask_row_stride + j.to(tl.int64) * x.mask_column_stride


@jit
def is_kept(i: Value, j: Value, b: Value, h: Value, x: Value) -> Value:
    """Return which weights dropout keeps: `cpcompile.runtime.tokens.dropout.is_kept` at the block's places."""
    first = x.place + tl.cast(b, tl.int64) * x.batch_places + tl.cast(h, tl.int64) * x.head_places + 1
    of_row = (first + i.to(tl.int64) * x.row_places).to(tl.uint64) * _GAMMA + tl.load(x.key).to(tl.uint64)
    z = of_row + j.to(tl.uint64) * _GAMMA
    z = (z ^ (z >> 30)) * _FACTOR_1
    z = (z ^ (z >> 27)) * _FACTOR_2
    return (z ^ (z >> 31)).to(tl.int64) >= x.threshold
