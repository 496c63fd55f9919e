"""The block kernels against the formula, how blocks are brought to kernels, and which kernel is chosen."""

from __future__ import annotations

import itertools
import math
import random
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.attention._fa3
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cpcompile.balance.token_spans import Rectangle
from cpcompile.runtime import kernels
from cpcompile.runtime.kernels import (
    Case,
    Kernel,
    KernelError,
    adapt,
    cpu,
    cudnn,
    cudnn_varlen,
    flash,
    flash_package,
    flex,
    triton,
)
from cpcompile.runtime.kernels import math as math_kernel
from cpcompile.runtime.kernels.block import Block, Dropout
from cpcompile.runtime.kernels.common import determinism
from cpcompile.runtime.tokens.dropout import is_kept

SCALE = 0.3
B, H, K, D, DV = 2, 4, 2, 6, 5
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def bools(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.4


def tensors(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dout, q, k, v: views of [B, S, H, D] memory."""
    sizes = ((rows, H, DV), (rows, H, D), (columns, K, D), (columns, K, DV))
    dout, q, k, v = (normal(B, *size).transpose(1, 2) for size in sizes)
    return dout, q, k, v


def sees(x: Block, b: int, h: int, i: int, j: int, rows: int) -> bool:
    """Say whether row i sees column j, as the documentation of `Block` says it."""
    if x.rectangles:
        within = [p for p in x.rectangles if 0 <= i - p.row < p.rows and 0 <= j - p.column < p.columns]
        if not within:
            return False
        (part,) = within
        i, j = i - part.row - part.rows, j - part.column - part.columns
    seen = x.high is None or j - i <= x.high or (x.prefix is not None and j < int(x.prefix.expand(B)[b]))
    seen = seen and (x.low is None or j - i >= x.low)
    if x.lengths:
        ids = [n for n, length in enumerate(x.lengths) for _ in range(length)]
        seen = seen and ids[i] == ids[j]
    if x.documents is not None:
        of_rows, of_columns = (ids.expand(B, -1) for ids in x.documents)
        seen = seen and bool(of_rows[b, i] == of_columns[b, j])
    if x.key_padding is not None:
        seen = seen and bool(x.key_padding.expand(B, -1)[b, j])
    if x.mask is not None and x.mask.dtype == torch.bool:
        seen = seen and bool(x.mask.expand(B, H, rows, -1)[b, h, i, j])
    return seen


def place(x: Dropout, b: int, h: int, i: int, j: int) -> int:
    return (((x.batch + b) * x.num_heads + x.head + h) * x.num_rows + x.row + i) * x.num_columns + x.column + j


def reference(q: Tensor, k: Tensor, v: Tensor, x: Block, extra: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the block, and of `extra` (q, k, v) that all rows see, by a loop over places."""
    rows, columns = q.shape[2], k.shape[2]
    k, v = (t.repeat_interleave(H // K, 1) for t in (k, v))
    s = q @ k.transpose(-1, -2) * x.scale
    if x.softcap:
        s = x.softcap * torch.tanh(s / x.softcap)
    if x.mask is not None and x.mask.dtype != torch.bool:
        s = s + x.mask
    hidden, factors = torch.zeros(s.shape, dtype=torch.bool), torch.ones_like(s)
    at, bias = [(b, h, i, j) for b in range(B) for h in range(H) for i in range(rows) for j in range(columns)], []
    for b, h, i, j in at:
        hidden[b, h, i, j] = not sees(x, b, h, i, j, rows)
        bias.append(0.0 if x.slopes is None else -float(x.slopes[h]) * abs(i - j + x.distance))
        if x.dropout is not None:
            kept = is_kept(x.dropout.seed, x.dropout.site, torch.tensor([place(x.dropout, b, h, i, j)]), x.dropout.p)
            factors[b, h, i, j] = float(kept) / (1 - x.dropout.p)
    s = (s + torch.tensor(bias, dtype=s.dtype).view(s.shape)).masked_fill(hidden, -math.inf)
    if extra:
        q_, k_, v_ = extra
        s = torch.cat([s, q_ @ k_.repeat_interleave(H // K, 1).transpose(-1, -2)], -1)
        factors = torch.nn.functional.pad(factors, (0, k_.shape[2]), value=1.0)
        v = torch.cat([v, v_.repeat_interleave(H // K, 1)], 2)
    lse = torch.logsumexp(s, -1)
    seen = (lse > -math.inf).unsqueeze(-1)
    p = torch.where(seen, torch.softmax(torch.where(seen, s, 0.0), -1), 0.0)
    return p * factors @ v, lse


def hiding_rows(mask: Tensor) -> Tensor:
    mask[0, :, 2] = False
    return mask


def minimum(rows: int, columns: int) -> Tensor:
    """Return a float mask with -inf, a row of it, and a row of the smallest number there is."""
    mask = normal(B, 1, rows, columns).masked_fill(~bools(B, 1, rows, columns), -math.inf)
    mask[0, 0, 1] = -math.inf
    mask[1, 0, 3] = torch.finfo(mask.dtype).min
    return mask


def dropout() -> Dropout:
    return Dropout(0.4, torch.tensor(77), 3, 1, 4, 12, 30, 20, 90, 80)


Make = Callable[[int, int], dict[str, Any]]
BLOCKS: dict[str, Make] = {
    "plain": lambda r, c: {},
    "causal": lambda r, c: {"high": 0},
    "mask": lambda r, c: {"mask": hiding_rows(bools(B, 1, r, c))},
    "mask of heads": lambda r, c: {"mask": hiding_rows(bools(1, H, r, c)), "high": 1},
    "mask of keys": lambda r, c: {"mask": bools(B, 1, 1, c)},
    "float mask": lambda r, c: {"mask": minimum(r, c), "high": 4},
    "documents": lambda r, c: {
        "documents": (torch.randint(3, (B, r)), torch.randint(4, (1, c))),
        "low": -3,
    },
    "key padding": lambda r, c: {"key_padding": torch.arange(c) >= torch.tensor([[c], [2]]), "high": 0},
    "prefix": lambda r, c: {"prefix": torch.tensor([3, -1]), "high": -1, "low": -4},
    "prefix of late columns": lambda r, c: {"prefix": torch.tensor([5, 3]), "high": 1, "low": 1},
    "prefix of no band": lambda r, c: {"prefix": torch.tensor([3])},
    "alibi": lambda r, c: {"slopes": SLOPES, "distance": -2, "high": 1},
    "softcap": lambda r, c: {"softcap": 0.7, "high": 0},
    "dropout": lambda r, c: {"dropout": dropout(), "high": 0},
    "everything": lambda r, c: {
        "low": -6,
        "high": 1,
        "mask": minimum(r, c),
        "documents": (torch.randint(2, (B, r)), torch.randint(2, (B, c))),
        "key_padding": bools(1, c),
        "prefix": torch.tensor([4]),
        "slopes": SLOPES,
        "distance": 3,
        "softcap": 2.0,
        "dropout": dropout(),
    },
}
BANDS = [
    (-2, None),
    (None, 3),
    (-3, -1),
    (2, 4),
    (-20, 20),
    (5, None),
    (None, -4),
    (-1, 0),
    (9, None),
    (1, 0),
    (-9, -6),
]
BLOCKS |= {f"band {low} {high}": lambda r, c, b=(low, high): {"low": b[0], "high": b[1]} for low, high in BANDS}
SHAPES = {"square": (7, 7), "wide": (6, 9), "tall": (9, 5)}
LENGTHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"high": 0},
    "window": {"low": -2, "high": 1},
    "past": {"high": -1, "low": -3},
    "prefix": {"high": -1, "prefix": torch.tensor([4])},
    "padding": {"high": 0, "key_padding": torch.arange(9) != 4},
    "dropout": {"dropout": dropout(), "slopes": SLOPES, "softcap": 1.5},
}


def check(rows: int, columns: int, block: Block, kernel: str) -> None:
    """Compare out, lse and the gradients, also those of a block whose rows see other keys besides."""
    dout, q, k, v = tensors(rows, columns)
    others = (normal(B, K, 3, D) * 0.5, normal(B, K, 3, DV))
    for extra in ((), (q, *others)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, block, extra)
        expected = torch.autograd.grad(out, leaves, dout, allow_unused=True)
        found: tuple[Tensor, ...] = kernels.backward(dout, q, k, v, out.detach(), lse.detach(), block, kernel)
        if not extra:
            found = (*kernels.forward(q, k, v, block, kernel), *found)
            expected = (out.detach(), lse.detach(), *expected)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# The kernels that run on CPUs, and which blocks they cannot take.
CPU: dict[str, tuple[str, ...]] = {
    "math": (),
    "cpu_flash": ("float mask", "alibi", "softcap", "dropout", "everything"),
}


def takes(kernel: str, block: Block) -> bool:
    q = normal(B, H, 1, D)
    return not kernels.KERNELS[kernels.NAMES.index(kernel)].refuses(Case.of(q, normal(B, K, 1, DV), block))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", CPU)
def test_block(kernel: str, shape: str, name: str) -> None:
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    block = Block(SCALE, **BLOCKS[name](rows, columns))
    if not takes(kernel, block):
        assert name in CPU[kernel]
        return
    check(rows, columns, block, kernel)


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("lengths", [(9,), (2, 3, 4), (1, 1, 7)], ids=str)
@pytest.mark.parametrize("kernel", CPU)
def test_documents_known_on_the_host(kernel: str, lengths: tuple[int, ...], name: str) -> None:
    torch.manual_seed(0)
    terms = LENGTHS[name]
    if "key_padding" in terms:
        terms = terms | {"key_padding": terms["key_padding"].expand(B, -1)}
    block = Block(SCALE, lengths=lengths, **terms)
    if takes(kernel, block):
        check(9, 9, block, kernel)


RECTANGLES = {
    "squares": ((0, 3, 0, 3), (3, 4, 3, 4)),
    "longer keys and gaps": ((1, 2, 0, 5), (4, 3, 2, 7)),
    "keys of two": ((6, 3, 1, 8), (0, 4, 1, 6)),
    "fewer keys": ((2, 5, 3, 2), (8, 1, 5, 1)),
}


@pytest.mark.parametrize("name", RECTANGLES)
@pytest.mark.parametrize(
    "terms", [{}, {"high": 0}, {"low": -2, "high": 0}, {"low": -1, "high": 1, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("as_it_is", [False, True])
def test_rectangles(as_it_is: bool, terms: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if as_it_is:
        use(monkeypatch, replace(math_kernel.KERNEL, name="whole", takes=kernels.FEATURES))
    torch.manual_seed(0)
    block = Block(SCALE, rectangles=tuple(Rectangle(*part) for part in RECTANGLES[name]), **terms)
    check(9, 9, block, "whole" if as_it_is else "math")


@pytest.mark.parametrize("name", BLOCKS)
def test_the_math_kernel_takes_a_block_as_it_is(name: str) -> None:
    torch.manual_seed(0)
    for rows, columns in SHAPES.values():
        block = Block(SCALE, **BLOCKS[name](rows, columns))
        dout, q, k, v = tensors(rows, columns)
        direct = math_kernel.forward(q, k, v, block)
        torch.testing.assert_close(direct, reference(q, k, v, block), rtol=1e-10, atol=1e-10)
        grads = math_kernel.backward(dout, q, k, v, *direct, block)
        expected = kernels.backward(dout, q, k, v, *direct, block, "math")
        torch.testing.assert_close(grads, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows, columns, batch", [(0, 4, 2), (4, 0, 2), (4, 4, 0)])
def test_empty_operands(rows: int, columns: int, batch: int) -> None:
    q, k, v = normal(batch, H, rows, D), normal(batch, K, columns, D), normal(batch, K, columns, DV)
    out, lse = kernels.forward(q, k, v, Block(SCALE))
    assert out.shape == (batch, H, rows, DV) and not out.any() and (lse == -math.inf).all()
    grads = kernels.backward(out, q, k, v, out, lse, Block(SCALE))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape] and not any(x.any() for x in grads)


def test_results_have_the_dtypes_of_the_operands() -> None:
    dout, q, k, v = (x.bfloat16() for x in tensors(7, 7))
    for kernel in CPU:
        for block in (Block(SCALE, high=0), Block(SCALE, high=-3), Block(SCALE, high=-9)):
            out, lse = kernels.forward(q, k, v, block, kernel)
            grads = kernels.backward(dout, q, k, v, out, lse, block, kernel)
            assert out.shape == dout.shape and lse.shape == q.shape[:3]
            assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
            assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


def use(monkeypatch: pytest.MonkeyPatch, *others: Kernel) -> None:
    """Put other kernels before those for CPUs."""
    table = (*others, cpu.KERNEL, math_kernel.KERNEL)
    monkeypatch.setattr(kernels, "KERNELS", table)
    monkeypatch.setattr(kernels, "NAMES", tuple(kernel.name for kernel in table))
    forget_choices()


def forget_choices() -> None:
    kernels.choose.cache_clear()
    kernels.known_calls.cache_clear()


@pytest.fixture(autouse=True)
def _forget_choices() -> Any:
    yield
    forget_choices()


def diagonal(q: Tensor, k: Tensor, left: int, right: int) -> tuple[int | None, int | None]:
    """Return low and high of a window as FlashAttention 2 counts it, from the last key.

    As many keys as there are, or more, are no bound to it, even where there are fewer keys than queries; and where there is one
    bound, it takes as many keys as there are for the other.
    """
    shift = k.shape[1] - q.shape[1]
    left, right = (-1 if bound >= k.shape[1] else bound for bound in (left, right))
    if max(left, right) >= 0:
        left, right = (k.shape[1] if bound < 0 else bound for bound in (left, right))
    return (None if left < 0 else shift - left), (None if right < 0 else shift + right)


def flash_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at_q: Tensor | None,
    at_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    p: float,
    is_causal: bool,
    debug: bool,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    """Stand in for `aten._flash_attention_forward`: `[B, S, H, D]`, or `[T, H, D]` with offsets."""
    assert p == 0 and not debug and not (is_causal and window_size_left >= 0)
    assert q.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    if at_q is None:
        low, high = diagonal(q, k, window_size_left, 0 if is_causal else window_size_right)
        block = Block(scale, low=low, high=high)
        out, lse = math_kernel.forward(*(x.transpose(1, 2) for x in (q, k, v)), block)
        return out.transpose(1, 2), lse, q
    assert at_k is at_q and at_q.dtype == torch.int32
    lengths = at_q.diff().tolist()
    assert longest_q == longest_k == max(lengths)
    window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    terms = (None, None, 0, 0, 0.0, is_causal, False)
    pieces = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    parts = [flash_forward(*(x[None] for x in piece), *terms, scale=scale, **window) for piece in pieces]
    return torch.cat([part[0][0] for part in parts]), torch.cat([part[1][0] for part in parts], 1), q


def flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    at_q: Tensor | None,
    at_k: Tensor | None,
    longest_q: int,
    longest_k: int,
    p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float,
    window_size_left: int = -1,
    window_size_right: int = -1,
) -> tuple[Tensor, ...]:
    assert lse.is_contiguous()
    if at_q is None:
        low, high = diagonal(q, k, window_size_left, 0 if is_causal else window_size_right)
        operands = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
        grads = math_kernel.backward(*operands, lse, Block(scale, low=low, high=high))
        return tuple(x.transpose(1, 2) for x in grads)
    lengths = at_q.diff().tolist()
    window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
    terms = (None, None, 0, 0, 0.0, is_causal, unused, unused)
    pieces = zip(*(x.split(lengths) for x in (dout, q, k, v, out)), lse.split(lengths, 1), strict=True)
    parts = [flash_backward(*(x[None].contiguous() for x in piece), *terms, scale=scale, **window) for piece in pieces]
    return tuple(torch.cat([x[0] for x in grads]) for grads in zip(*parts, strict=True))


def stand_in_for_flash() -> Kernel:
    def call() -> tuple[Any, Any]:
        return flash_forward, flash_backward

    return flash._provider("stand_in", call, lambda case: "", *flash.FLASH2.takes)


@pytest.mark.parametrize("low, high", BANDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_gets_every_band(shape: str, low: int, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    use(monkeypatch, stand_in_for_flash())
    check(*SHAPES[shape], Block(SCALE, low=low, high=high), "stand_in")


@pytest.mark.parametrize("rows, columns", [(7, 3), (6, 5), (4, 4), (2, 5)])
def test_bands_of_flash_attention_hide_what_they_should(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bands of some blocks: with and without one of the bounds, off the diagonal, and with more rows than columns."""
    use(monkeypatch, stand_in_for_flash())
    _, q, k, v = tensors(rows, columns)
    for low, high in itertools.product((None, *range(-7, 5)), (None, *range(-6, 6))):
        for rectangles in ((), (Rectangle(0, rows, 0, columns),)):
            block = Block(SCALE, low=low, high=high, rectangles=rectangles)
            found, expected = (kernels.forward(q, k, v, block, kernel) for kernel in ("stand_in", "math"))
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "causal", "window", "past"])
def test_flash_attention_gets_documents(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    use(monkeypatch, stand_in_for_flash())
    calls = []
    monkeypatch.setattr(flash, "starts", lambda *x, f=flash.starts: calls.append(x) or f(*x))
    check(9, 9, Block(SCALE, lengths=(2, 3, 4), **LENGTHS[name]), "stand_in")
    # A band without the diagonal cannot be said of several documents at once.
    assert bool(calls) == (name != "past")


def package_function(name: str) -> Callable[..., Any]:
    """Stand in for the functions of flash-attn 2.7 and later, by their signatures."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *lengths: Any,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: None,
        return_softmax: bool,
    ) -> tuple[Tensor, ...]:
        assert softcap == 0 and alibi_slopes is None and not return_softmax
        window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        sizes = lengths or (None, None, 0, 0)
        out, lse, _ = flash_forward(q, k, v, *sizes, dropout_p, causal, False, scale=softmax_scale, **window)
        return out, lse, q, q

    def backward(
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        *lengths: Any,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: None,
        deterministic: bool,
    ) -> None:
        assert softcap == 0 and alibi_slopes is None and not deterministic
        window = {"window_size_left": window_size_left, "window_size_right": window_size_right}
        terms = (*(lengths or (None, None, 0, 0)), dropout_p, causal, q, q)
        grads = flash_backward(dout, q, k, v, out, lse, *terms, scale=softmax_scale, **window)
        for result, grad in zip((dq, dk, dv), grads, strict=True):
            result.copy_(grad)

    assert ("varlen" in name) == name.startswith("_flash_attn_varlen_")
    return forward if name.endswith("forward") else backward


@pytest.mark.parametrize("lengths", [(), (2, 3, 4)])
def test_the_package_flash_attn_is_called_by_its_signature(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(flash_package, "_function", package_function)
    use(monkeypatch, replace(flash_package.FLASH_ATTN, limits=lambda case: ""))
    for terms in ({}, {"high": 0}, {"low": -2, "high": 1}):
        check(9, 9, Block(SCALE, lengths=lengths, **terms), "flash_attn")


def test_heads_are_padded_and_masks_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[tuple[int, int, Block]] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        got.append((q.shape[-1], v.shape[-1], block))
        return math_kernel.forward(q, k, v, block)

    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        assert dout.shape[-1] == rest[0].shape[-1] == v.shape[-1]
        got.append((q.shape[-1], v.shape[-1], rest[-1]))
        return math_kernel.backward(dout, q, k, v, *rest)

    takes = frozenset(("causal", "mask", "softcap"))
    use(monkeypatch, Kernel("narrow", forward, backward, lambda case: "", takes, lambda case: (8, 16)))
    torch.manual_seed(0)
    check(6, 9, Block(SCALE, low=-3, high=2, softcap=2.0, documents=BLOCKS["documents"](6, 9)["documents"]), "narrow")
    assert all((head, value) == (8, 16) for head, value, _ in got)
    assert all(x.mask is not None and x.documents is None and not x.has_band and x.softcap == 2.0 for *_, x in got)
    got.clear()
    check(7, 7, Block(SCALE, high=0), "narrow")
    assert all(x.mask is None and x.is_causal_square for *_, x in got)


def test_bands_are_trimmed_to_squares() -> None:
    part = adapt.trim(Block(SCALE, high=-4, distance=1), 10, 8)
    assert (part.rows, part.columns) == (slice(4, 10), slice(0, 6))
    assert part.block.is_causal_square and part.block.distance == 5
    part = adapt.trim(Block(SCALE, low=-20, high=20), 10, 8)
    assert part.is_whole(10, 8) and not part.block.has_band
    assert adapt.trim(Block(SCALE, high=-10), 10, 8).is_empty
    assert adapt.trim(Block(SCALE, low=8), 10, 8).is_empty
    assert adapt.trim(Block(SCALE, low=3, high=2), 10, 8).is_empty
    part = adapt.trim(Block(SCALE, high=-4, prefix=torch.tensor([2])), 10, 8)
    assert part.is_whole(10, 8) and part.block.high == -4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BLOCKS)
def test_flex_attention_and_its_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention without a compiler, and called from an operator, whose body runs below autograd."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # the uncompiled form goes through Dynamo all the same
    rows, columns = SHAPES["wide"]
    block = Block(SCALE, **BLOCKS[name](rows, columns))
    if reason := flex.KERNEL.refuses(replace(Case.of(normal(1), normal(1), block), device="cuda", dtype=HALF)):
        assert reason in ("takes no float mask", "takes no dropout", "takes no float mask, no dropout")
        return

    def attend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        return flex.attend(q, k, v, block, flex_attention, create_block_mask)

    # It refuses gradients on CPUs, where only its uncompiled form has them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *operands: None)
    monkeypatch.setattr(flex, "_attend_compiled", attend)
    use(monkeypatch, replace(flex.KERNEL, limits=lambda case: ""))
    check(rows, columns, block, "flex")
    found = []

    @torch.library.custom_op("cpcompile_tests::flex", mutates_args=())
    def operator(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        found.extend(kernels.backward(dout, q, k, v, out, lse, block, "flex"))
        return q.new_zeros(())

    dout, q, k, v = tensors(rows, columns)
    out, lse = kernels.forward(q, k, v, block, "math")
    operator(dout, q.requires_grad_(), k, v, out, lse)
    expected = kernels.backward(dout, q.detach(), k, v, out, lse, block, "math")
    torch.testing.assert_close(tuple(found), expected, rtol=1e-10, atol=1e-10)


def test_determinism_is_asked_for_and_given_back() -> None:
    with determinism(Block(SCALE)):
        assert not torch.are_deterministic_algorithms_enabled()
    with determinism(Block(SCALE, is_deterministic=True)):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert "deterministic" in Case.of(*[normal(1, 1, 1, 8)] * 2, Block(SCALE)).features
        with determinism(Block(SCALE, is_deterministic=True)):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


FORWARD_3 = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? qv, Tensor? out, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
    "Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float? softmax_scale, bool causal, "
    "int window_size_left, int window_size_right, int attention_chunk, float softcap, bool rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin) -> (Tensor, Tensor, Tensor, Tensor)"
)
BACKWARD_3 = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_q, Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, "
    "float? softmax_scale, bool causal, int window_size_left, int window_size_right, float softcap, bool deterministic, "
    "int sm_margin) -> Tensor"
)


@pytest.fixture
def flash_attn_3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Act as if FlashAttention 3 were installed: its operators as the package declares them, in plain torch.

    torch's functions in between are the real ones, but for their check of the device.
    """
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FORWARD_3)
    library.define(BACKWARD_3)

    def forward(q: Tensor, k: Tensor, v: Tensor, *terms: Any) -> tuple[Tensor, ...]:
        named = dict(
            zip([x.name for x in torch.ops.flash_attn_3.fwd.default._schema.arguments[3:]], terms, strict=True)
        )
        window = {name: named[name] for name in ("window_size_left", "window_size_right")}
        lengths = [named[f"{name}_{of}"] for name in ("cu_seqlens", "max_seqlen") for of in "qk"]
        assert named["softcap"] == named["attention_chunk"] == 0 and named["num_splits"] == 0
        given = (*lengths, 0.0, named["causal"], False)
        out, lse, _ = flash_forward(q, k, v, *given, scale=named["softmax_scale"], **window)
        return out, lse, q.new_empty(0), q.new_empty(0)

    def backward(*given: Any) -> Tensor:
        named = dict(zip([x.name for x in torch.ops.flash_attn_3.bwd.default._schema.arguments], given, strict=True))
        window = {name: named[name] for name in ("window_size_left", "window_size_right")}
        operands = [named[name] for name in ("dout", "q", "k", "v", "out", "softmax_lse")]
        lengths = [named[f"{name}_{of}"] for name in ("cu_seqlens", "max_seqlen") for of in "qk"]
        terms = (*lengths, 0.0, named["causal"], operands[0], operands[0])
        grads = flash_backward(*operands, *terms, scale=named["softmax_scale"], **window)
        for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
            named[name].copy_(grad)
        return operands[0].new_empty(0)

    library.impl("fwd", forward, "CPU")
    library.impl("bwd", backward, "CPU")
    monkeypatch.setitem(sys.modules, flash.FLASH3_PACKAGE.module, types.ModuleType(flash.FLASH3_PACKAGE.module))
    for name in ("forward", "backward"):
        monkeypatch.setattr(torch.nn.attention._fa3, f"_fa3_{name}_support_error", lambda *args: None)
    flash._flash3.cache_clear()
    yield
    flash._flash3.cache_clear()
    library._destroy()


@pytest.mark.usefixtures("flash_attn_3")
@pytest.mark.parametrize("lengths", [(), (2, 3, 4)])
def test_flash_attention_3_is_called_by_its_operators(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    use(monkeypatch, replace(flash.FLASH3, limits=lambda case: ""))
    for terms in ({}, {"high": 0}, {"low": -2, "high": 1}):
        check(9, 9, Block(SCALE, lengths=lengths, **terms), "flash3")
    for low, high in ((-3, 2), (None, 3)) if not lengths else ():
        check(6, 9, Block(SCALE, low=low, high=high), "flash3")  # the second ends in the last corner
    assert torch.nn.attention.current_flash_attention_impl() is None  # the user's own attention is what it was


@pytest.mark.parametrize("num_results", [2, 5])  # of 4.0.0b3 and of 4.0.0b36
@pytest.mark.parametrize("lengths", [(), (2, 3, 4)])
def test_flash_attention_4_is_called_by_its_functions(
    lengths: tuple[int, ...], num_results: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        return_lse: bool = False,
    ) -> tuple[Any, ...]:
        assert return_lse
        terms = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False)
        out, lse, _ = flash_forward(q, k, v, *terms, scale=softmax_scale)
        return out, lse, *[None] * (num_results - 2)

    def backward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        dout: Tensor,
        lse: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
    ) -> tuple[Tensor, ...]:
        terms = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, q, q)
        return flash_backward(dout, q, k, v, out, lse, *terms, scale=softmax_scale)

    module = types.SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)
    monkeypatch.setattr(flash.importlib, "import_module", lambda name: module)
    flash._flash4.cache_clear()
    use(monkeypatch, replace(flash.FLASH4, limits=lambda case: "", avoids=lambda case: ""))
    for terms in ({}, {"high": 0}):
        check(9, 9, Block(SCALE, lengths=lengths, **terms), "flash4")
    flash._flash4.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "generation", "given", "reason"),
    [
        ("flash3", 9, ("window", "lengths"), ""),
        ("flash3", 10, (), "needs a Hopper GPU"),
        ("flash3", 9, ("causal", "deterministic"), "takes no deterministic mode"),
        ("flash4", 10, ("causal", "lengths"), ""),
        ("flash4", 8, (), "needs a Hopper or Blackwell GPU"),
        ("flash4", 9, ("window",), "takes no causal window"),
    ],
)
def test_which_attentions_and_gpus_flash_attention_3_and_4_are_for(
    kernel: str, generation: int, given: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "is_installed", lambda name: True)
    monkeypatch.setattr(flash, "gpu_generation", lambda: generation)
    asked = kernels.KERNELS[kernels.NAMES.index(kernel)]
    assert asked.refuses(case("cuda", torch.bfloat16, 128, 128, *given)) == reason
    most = {"flash3": 256, "flash4": 128}[kernel]
    if not reason:
        wide = case("cuda", torch.bfloat16, most + 8, most)
        assert asked.refuses(wide) == f"needs head dims of at most {most}"
        assert asked.refuses(case("cuda", torch.float32)) == "has no float32"


@pytest.mark.parametrize(
    ("head", "value", "is_exact"), [(64, 64, True), (60, 128, True), (96, 8, True), (80, 80, False), (8, 8, False)]
)
def test_head_dims_that_flash_attention_4_is_exact_for(
    head: int, value: int, is_exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others its gradients are wrong, and it says nothing."""
    monkeypatch.setattr(flash, "is_installed", lambda name: True)
    monkeypatch.setattr(flash, "gpu_generation", lambda: 9)
    reason = "" if is_exact else "was proven exact for head dims of 64, 96, 128 only"
    assert flash.FLASH4.refuses(case("cuda", torch.bfloat16, head, value)) == reason


@pytest.mark.usefixtures("hopper")
def test_what_took_the_place_of_flash_attention_2_is_not_called_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents on a machine with nothing but torch's kernels and FlashAttention 4, which the user has activated."""
    monkeypatch.setattr(flash, "is_installed", lambda name: name == flash.FLASH4_PACKAGE.module)
    monkeypatch.setattr(flash, "gpu_generation", lambda: 10)
    packed, wide = (case("cuda", torch.bfloat16, dim, dim, "causal", "lengths") for dim in (64, 256))
    assert kernels.choose(packed).kernel.name == "flash4" and kernels.choose(wide).kernel.name == "flash"
    torch.nn.attention.register_flash_attention_impl("stand-in", register_fn=lambda: types.SimpleNamespace(remove=int))
    torch.nn.attention.activate_flash_attention_impl("stand-in")
    try:
        forget_choices()
        assert kernels.choose(packed).kernel.name == "flash4" and kernels.choose(wide).kernel.name != "flash"
        with pytest.raises(KernelError, match=r"'flash' is stand-in in this process, by torch.nn.attention.activate"):
            kernels.choose(wide, "flash")
        with pytest.raises(KernelError, match=r"'flash' is stand-in"):
            flash.FLASH2.forward(*[torch.zeros(1, 1, 2, 8)] * 3, Block(SCALE))
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        torch.nn.attention._registry._FLASH_ATTENTION_IMPLS.pop("stand-in")
    assert kernels.choose(packed).kernel.name == "flash4"
    monkeypatch.setattr(flash, "gpu_generation", lambda: 9)
    forget_choices()
    assert kernels.choose(packed).kernel.name == "flash4"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("generation", "given", "name"),
    [
        (9, (), "flash4"),
        (9, ("causal", "varied"), "flash4"),
        (9, ("causal",), "flash4"),
        (9, ("causal", "lengths"), "flash4"),
        (9, ("causal", "rectangles"), "triton"),
        (9, ("window",), "triton"),
        (10, ("causal",), "cudnn"),
        (10, ("causal", "lengths"), "flash4"),
        (8, ("causal",), "cudnn"),
    ],
)
def test_what_flash_attention_4_is_chosen_for(
    generation: int, given: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ("triton", flash.FLASH4_PACKAGE.module)
    monkeypatch.setattr(flash, "is_installed", lambda name: name in installed)
    monkeypatch.setattr(flash, "gpu_generation", lambda: generation)
    forget_choices()
    assert kernels.choose(case("cuda", torch.bfloat16, 128, 128, *given)).kernel.name == name
    if "lengths" in given:  # steps with packed documents were no faster by it
        monkeypatch.setattr(flash, "is_installed", lambda name: True)
        monkeypatch.setattr(cudnn_varlen, "is_installed", lambda name: True)
        forget_choices()
        assert kernels.choose(case("cuda", torch.bfloat16, 128, 128, *given)).kernel.name == "cudnn_varlen"


def case(device: str, dtype: torch.dtype = torch.bfloat16, head: int = 64, value: int = 64, *features: str) -> Case:
    return Case(device, dtype, head, value, frozenset(features))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Act as if there were a Hopper GPU, Triton and no other package."""
    monkeypatch.setattr(cudnn, "_version", lambda: 91900)
    for module in (triton, flash, flash_package, cudnn_varlen):
        monkeypatch.setattr(module, "is_installed", lambda name: name == "triton")
    forget_choices()


@pytest.mark.parametrize(
    ("rows", "columns", "lengths", "high"),
    [
        (21, 21, (), 0),
        (24, 24, (), 0),
        (8, 40, (), None),
        (21, 16, (), None),
        (21, 19, (), None),
        (7, 7, (), 0),
        (60, 60, (3, 21, 4, 5, 16, 11), 0),
        (60, 60, (3, 57), 0),
        (60, 60, (30, 30), None),
    ],
)
def test_parts_of_known_sizes_are_the_block(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, lengths: tuple[int, ...], high: int | None
) -> None:
    monkeypatch.setattr(adapt, "LONG", 16)
    monkeypatch.setattr(adapt, "STEP", 8)
    block, cpu_ = Block(SCALE, high=high, lengths=lengths, is_varied=True), torch.device("cpu")
    seen = torch.zeros(rows, columns, dtype=torch.long)
    for part in adapt.of_known_sizes(adapt.Part(slice(0, rows), slice(0, columns), block)):
        view = seen[part.rows, part.columns]
        visible = part.block.visible(*view.shape, cpu_)
        view += 1 if visible is None else visible[0, 0]
        assert part.block.is_varied or not (part.block.lengths or any(size % 8 for size in view.shape))
    whole = block.visible(rows, columns, cpu_)
    assert torch.equal(seen, torch.ones_like(seen) if whole is None else whole[0, 0].long())


HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
CHOICES = [
    (case("cuda"), "cudnn"),
    (case("cuda", HALF, 128, 128, "causal"), "cudnn"),
    (case("cuda", HALF, 60, 100), "cudnn"),
    (case("cuda", HALF, 192, 128, "causal"), "cudnn"),
    (case("cuda", HALF, 136, 72), "cudnn"),
    (case("cuda", HALF, 136, 136), "flash"),
    (case("cuda", HALF, 256, 256, "causal"), "flash"),
    (case("cuda", HALF, 128, 128, "band"), "triton"),
    (case("cuda", HALF, 128, 128, "window"), "triton"),
    (case("cuda", HALF, 128, 128, "causal", "lengths"), "triton"),
    (case("cuda", HALF, 128, 128, "causal", "varied"), "triton"),
    (case("cuda", HALF, 128, 128, "causal", "deterministic"), "triton"),
    (case("cuda", HALF, 128, 128, "causal", "documents"), "triton"),
    (case("cuda", HALF, 128, 128, "mask"), "triton"),
    (case("cuda", HALF, 128, 128, "softcap", "dropout", "alibi", "bias", "prefix"), "triton"),
    (case("cuda", FLOAT, 64, 64), "triton"),
    (case("cuda", HALF, 320, 320, "documents"), "efficient"),
    (case("cuda", FLOAT, 576, 512, "causal"), "efficient"),
    (case("cuda", HALF, 320, 320, "softcap"), "flex"),
    (case("cuda", HALF, 320, 320, "dropout"), "math"),
    (case("cuda", DOUBLE, 64, 64), "math"),
    (case("cpu", DOUBLE, 64, 32, "band", "lengths"), "cpu_flash"),
    (case("cpu", FLOAT, 64, 64, "softcap"), "math"),
    (case("cpu", FLOAT, 64, 64, "bias"), "math"),
    (case("xpu", HALF, 64, 64), "math"),
]


@pytest.mark.usefixtures("hopper")
def test_documents_go_to_cudnn_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_varlen, "is_installed", lambda name: name == "cudnn")
    for features in (("lengths",), ("causal", "rectangles"), ("causal", "varied")):
        assert kernels.choose(case("cuda", HALF, 128, 128, *features)).kernel.name == "cudnn_varlen"
    assert kernels.choose(case("cuda", HALF, 128, 128, "causal")).kernel.name == "cudnn"
    assert kernels.choose(case("cuda", HALF, 128, 128, "window")).kernel.name == "cudnn_varlen"
    assert kernels.choose(case("cuda", HALF, 128, 128, "band", "lengths")).kernel.name == "triton"
    # It needs no sizes that recur.
    calls = kernels.known_calls(Block(SCALE, high=0, is_varied=True), "auto", 5000, 5000, "cuda", HALF, 64, 64)
    assert [call.kernel.name for call in calls] == ["cudnn_varlen"]


def test_documents_and_rows_of_the_batch_are_rectangles_one_after_the_other() -> None:
    found = cudnn_varlen._rectangles(2, 9, 9, Block(SCALE, high=0, lengths=(2, 3, 4)))
    assert [part[:2] for part in found] == [part[2:] for part in found] == [
        (0, 2), (2, 3), (5, 4), (9, 2), (11, 3), (14, 4)
    ]  # fmt: skip
    parts = Rectangle(1, 2, 0, 5), Rectangle(4, 3, 2, 7)
    assert cudnn_varlen._rectangles(2, 9, 9, Block(SCALE, rectangles=parts)) == (*parts, (10, 2, 9, 5), (13, 3, 11, 7))


@pytest.mark.usefixtures("hopper")
def test_an_old_package_of_cudnn_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudnn_varlen, "is_installed", lambda name: True)
    packed = case("cuda", HALF, 64, 64, "lengths")
    for version, reason in (("1.17.2", "needs nvidia-cudnn-frontend 1.18 or newer"), ("1.18.0", ""), ("2.0", "")):
        monkeypatch.setattr(cudnn_varlen.importlib.metadata, "version", lambda name, version=version: version)
        cudnn_varlen._is_old.cache_clear()
        assert cudnn_varlen.KERNEL.refuses(packed) == reason
    cudnn_varlen._is_old.cache_clear()


@pytest.mark.usefixtures("hopper")
def test_tall_blocks_are_cut_for_those_who_count_from_the_last_key_alone() -> None:
    window = Block(SCALE, low=-40, high=0)

    def num_calls(kernel: str) -> int:
        return len(kernels.known_calls(window, kernel, 100, 70, "cuda", torch.bfloat16, 64, 64))

    assert {name: num_calls(name) for name in ("triton", "efficient", "flash")} == {
        "triton": 1,
        "efficient": 1,
        "flash": 3,
    }


def test_plans_serve_all_sizes_up_to_few() -> None:
    shapes = [torch.Size((20000, heads, dim)) for heads, dim in ((4, 16), (2, 16), (2, 8))]

    def form(*rectangles: tuple[int, int, int, int], **terms: Any) -> Any:
        parts = tuple(Rectangle(*part) for part in rectangles)
        return cudnn_varlen._Form.of(0, HALF, shapes, Block(SCALE, rectangles=parts, **terms), parts)

    first = form((0, 130, 0, 300), (200, 256, 400, 257), (500, 1, 0, 1))
    assert (first.num, first.size, first.tokens) == (16, 1024, 32768)
    assert first == form((0, 200, 0, 1024), (200, 5, 500, 7), (300, 5, 0, 9), (400, 1, 50, 9))
    assert form((0, 200, 0, 1025)).size == 4096 and form((0, 17000, 0, 1)).size == 32768  # no more than all tokens
    assert form(*[(0, 1, 0, 1)] * 17).num == 64
    assert not first.is_shifted and not first.is_causal and first.window == 0
    assert form((0, 9, 0, 12), high=0).is_shifted and not form((0, 9, 0, 9), high=0).is_shifted
    assert form((0, 9, 0, 9), high=0, low=-6).window == 7
    # A square of its own begins in the first corner, whatever its sizes are.
    assert not cudnn_varlen._Form.of(0, HALF, shapes, Block(SCALE, high=0), (Rectangle(0, 9, 0, 12),)).is_shifted


def test_documents_that_change_meet_plans_that_are_there() -> None:
    """Up to 16 documents of 64k tokens over 4 ranks, and hulls of any size: cuDNN makes each plan in 50 ms."""
    forms, draw = set(), random.Random(0)
    for _ in range(300):
        rows, columns = draw.randrange(1, 16385), draw.randrange(1, 65537)
        parts = tuple(
            Rectangle(0, draw.randrange(1, rows + 1), 0, draw.randrange(1, columns + 1))
            for _ in range(draw.randrange(1, 17))
        )
        shapes = [torch.Size((rows, 4, 64)), torch.Size((columns, 2, 64)), torch.Size((columns, 2, 64))]
        forms.add(cudnn_varlen._Form.of(0, HALF, shapes, Block(SCALE, rectangles=parts), parts))
    assert len(forms) <= 8  # hundreds with powers of two for each


def test_numbers_of_rectangles_as_the_graph_reads_them() -> None:
    shapes = [torch.Size((100, heads, dim)) for heads, dim in ((4, 16), (2, 16), (2, 8))]
    parts = Rectangle(5, 10, 0, 30), Rectangle(40, 20, 30, 25), Rectangle(60, 3, 55, 7)
    form = cudnn_varlen._Form.of(0, HALF, shapes, Block(SCALE, rectangles=parts), parts)
    numbers = torch.tensor(cudnn_varlen._numbers_of(parts, form))
    starts, sizes = numbers[: 5 * 17].view(5, 17), numbers[5 * 17 :].view(torch.int32).view(2, 16)
    rows, columns = torch.tensor([5, 40, 60] + 14 * [63]), torch.tensor([0, 30, 55] + 14 * [62])
    assert torch.equal(starts, torch.stack([rows * 64, rows * 32, rows * 4, columns * 32, columns * 16]))
    assert sizes.tolist() == [[10, 20, 3] + 13 * [0], [30, 25, 7] + 13 * [0]]


@pytest.mark.usefixtures("hopper")
def test_it_is_said_once_that_a_faster_kernel_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    kernels._say_what_is_missing.cache_clear()
    kernels.choose(case("cuda", HALF, 64, 64, "lengths", "softcap"))
    kernels.choose(case("cuda", HALF, 64, 64, "window", "alibi"))
    assert not caplog.records, "it would not take these either"
    for features in (("causal",), ("window",), ("lengths",), ("causal", "varied")):
        kernels.choose(case("cuda", HALF, 64, 64, *features))
    kernels.choose(case("cuda", FLOAT, 64, 64, "lengths"))  # which it would not take
    (record,) = caplog.records
    assert "run on triton kernels: pip install nvidia-cudnn-frontend" in record.getMessage()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case, name", CHOICES, ids=[f"{i}-{name}" for i, (_, name) in enumerate(CHOICES)])
def test_choice(case: Case, name: str) -> None:
    assert kernels.choose(case).kernel.name == name
    assert kernels.choose(case, name).kernel.name == name


def test_a_block_is_planned_once_and_one_with_tensors_each_time() -> None:
    q, block = normal(1, 2, 4, 8), Block(SCALE, high=0)
    for _ in range(3):
        kernels.forward(q, q, q, block)
        kernels.forward(q, q, q, replace(block, key_padding=torch.ones(1, 4, dtype=torch.bool)))
    assert kernels.known_calls.cache_info()[:2] == (2, 1)


@pytest.mark.usefixtures("hopper")
def test_choice_says_why() -> None:
    choice = kernels.choose(case("cuda", HALF, 136, 136, "documents", "causal", "softcap"))
    assert choice.reasons == (
        "flash4 is not installed (pip install flash-attn-4)",
        "cudnn needs head dims of at most 128, or 192 and 128",
        "cudnn_varlen needs head dims of at most 128, or 192 and 128",
        "flash3 is not installed (pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130)",
        "flash takes no documents, no softcap",
        "flash_attn is not installed (pip install flash-attn)",
        "ring_flash_attn has no kernels of its own, it calls those of flash_attn (pip install flash-attn)",
    )
    assert kernels.explain(case("cuda")) == "cudnn (flash4 is not installed (pip install flash-attn-4))"
    assert kernels.explain(case("cuda", HALF, 60, 100), "flash") == "flash with head dims padded to 104 and 104"
    assert kernels.explain(case("cuda", FLOAT, 64, 64, "documents", "lengths"), "efficient") == (
        "efficient with a mask of all rows and columns, one document at a time"
    )
    assert kernels.explain(case("cuda", HALF, 64, 64, "lengths")).startswith(
        "triton (flash4 is not installed (pip install flash-attn-4); cudnn plans anew for each length of a document; "
        "cudnn_varlen is not installed (pip install nvidia-cudnn-"
    )


@pytest.mark.usefixtures("hopper")
def test_a_kernel_that_cannot_serve_is_an_error() -> None:
    with pytest.raises(
        KernelError,
        match=r"(?m)no kernel is called 'fast': there are auto, flash4, cudnn, cudnn_varlen, flash3, .*, math$",
    ):
        kernels.choose(case("cuda"), "fast")
    with pytest.raises(KernelError) as error:
        kernels.choose(case("cuda", HALF, 64, 64, "band", "softcap"), "flash")
    assert str(error.value) == (
        "the kernel 'flash' takes no softcap. Kernels for this attention: auto, triton, flex, math"
    )
    for asked, given, reason in (
        ("cudnn", case("cpu"), "runs on cuda"),
        ("cudnn", case("cuda", FLOAT), "has no float32"),
        ("cudnn", case("cuda", HALF, 256, 256), "needs head dims of at most 128, or 192 and 128"),
        ("cudnn", case("cuda", HALF, 64, 64, "deterministic"), "takes no deterministic mode"),
        ("flash", case("cuda", HALF, 264, 8), "needs head dims of at most 256"),
        ("cpu_flash", case("cpu", FLOAT, 8, 8, "alibi", "bias"), "takes no float mask, no ALiBi"),
    ):
        assert kernels.KERNELS[kernels.NAMES.index(asked)].refuses(given) == reason
    q = normal(1, 1, 2, 4)
    with pytest.raises(KernelError, match=r"'flash' runs on cuda\. Kernels for this attention: auto, cpu_flash, math"):
        kernels.forward(q, q, q, Block(SCALE), "flash")


def test_old_cudnn_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = kernels.KERNELS[kernels.NAMES.index("cudnn")]
    for version, dims, is_right in ((91501, 64, True), (91500, 64, False), (0, 64, False)):
        monkeypatch.setattr(cudnn, "_version", lambda version=version: version)
        assert (not asked.refuses(case("cuda", HALF, dims, dims))) == is_right


def test_a_case_can_be_made_of_fake_tensors() -> None:
    block = Block(SCALE, low=-3, high=0, documents=(torch.zeros(1, 2),) * 2, softcap=1.0, lengths=(2,))
    with FakeTensorMode():
        q, v = torch.empty(1, 4, 2, 8, dtype=HALF), torch.empty(1, 2, 2, 16, dtype=HALF)
        found = Case.of(q, v, block)
    assert found == Case("cpu", HALF, 8, 16, frozenset(("window", "documents", "softcap")))
