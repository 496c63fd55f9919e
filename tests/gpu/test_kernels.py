"""CUDA kernels on one GPU against the formula in float64, and ranks in lockstep with the kernels that would run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import cpcompile
from cpcompile.balance.token_spans import Rectangle
from cpcompile.runtime import kernels
from cpcompile.runtime.kernels import Case, cudnn_varlen, flash
from cpcompile.runtime.kernels.block import Block, Dropout
from cpcompile.runtime.kernels.merge import merge_
from tests.models import batch, error, llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch's own code uses what torch deprecates, FlashAttention 4 what its own packages do, which also warn of its arguments.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Argument .* cannot be converted:UserWarning"),
]

SCALE = 0.2
B, H, K, D = 2, 4, 2, 64
CUDA = [name for name in kernels.NAMES if name not in ("ring_flash_attn", "cpu_flash")]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Attention rounds the weights and its results once each, and dq, dk, dv also their products.
LIMITS = {dtype: 4 * torch.finfo(dtype).eps for dtype in (BF16, FP16)} | {FP32: 1e-5, FP64: 1e-11}


def head_major(x: Tensor) -> Tensor:
    """Return `x` with heads before tokens in memory."""
    return x.contiguous()


def sequence_major(x: Tensor) -> Tensor:
    """Return `x` with tokens before heads in memory, as a projection makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x: Tensor) -> Tensor:
    """Return `x` as rows of a longer tensor, as the chunks of zig-zag are."""
    return torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], 2).narrow(2, x.shape[2], x.shape[2])


Arrange = Callable[[Tensor], Tensor]
# Rows, columns, memory order. None is a multiple of the kernels' tiles.
SHAPES: dict[str, tuple[int, int, Arrange]] = {
    "square": (301, 301, sequence_major),
    "wide": (77, 290, sliced),
    "tall": (290, 77, head_major),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def bools(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(9)) > 0.3).cuda()


def hiding_rows(mask: Tensor) -> Tensor:
    mask[0, :, 5] = False
    return mask


def float_mask(rows: int, columns: int) -> Tensor:
    """Return a float mask with -inf, a row of it, and a row of the smallest number there is."""
    mask = normal(B, 1, rows, columns, seed=8).masked_fill(~bools(B, 1, rows, columns), -math.inf)
    mask[0, 0, 1] = -math.inf
    mask[1, 0, 3] = torch.finfo(mask.dtype).min
    return mask


def ids(size: int, of: int) -> Tensor:
    return (torch.arange(size) // of).expand(B, -1).cuda()


def slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625]).cuda()


def dropout() -> Dropout:
    return Dropout(0.4, torch.tensor(77).cuda(), 3, 1, 4, 12, 300, 200, 900, 800)


BLOCKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "plain": lambda r, c: {},
    "causal": lambda r, c: {"high": 0},
    "window": lambda r, c: {"low": -40, "high": 0},
    "both sides": lambda r, c: {"low": -50, "high": 30},
    "past": lambda r, c: {"high": -33},
    "distant window": lambda r, c: {"low": -250, "high": -60},
    "right of the diagonal": lambda r, c: {"low": 20},
    "nothing": lambda r, c: {"low": 400},
    "mask": lambda r, c: {"mask": hiding_rows(bools(B, 1, r, c))},
    "mask of heads": lambda r, c: {"mask": hiding_rows(bools(1, H, r, c)), "high": 20},
    "mask of keys": lambda r, c: {"mask": bools(B, 1, 1, c)},
    "float mask": lambda r, c: {"mask": float_mask(r, c), "high": 100},
    "documents": lambda r, c: {"documents": (ids(r, 70), ids(c, 90)), "high": 10},
    "key padding": lambda r, c: {"key_padding": torch.arange(c).cuda() >= torch.tensor([[c], [31]]).cuda()},
    "prefix": lambda r, c: {"prefix": torch.tensor([50, 3]).cuda(), "high": -5, "low": -200},
    "alibi": lambda r, c: {"slopes": slopes(), "distance": 25, "high": 0},
    "softcap": lambda r, c: {"softcap": 2.0, "high": 0},
    "softcap of a window": lambda r, c: {"softcap": 2.0, "high": 0, "low": -40},
    "dropout": lambda r, c: {"dropout": dropout(), "high": 0},
    "everything": lambda r, c: {
        "low": -200,
        "high": 1,
        "mask": float_mask(r, c),
        "documents": (ids(r, 130), ids(c, 130)),
        "key_padding": bools(1, c),
        "prefix": torch.tensor([40]).cuda(),
        "slopes": slopes(),
        "distance": 3,
        "softcap": 4.0,
        "dropout": dropout(),
    },
}


def takes(kernel: str, dtype: torch.dtype, block: Block, head: int = D, value: int = D) -> None:
    """Skip what the kernel refuses."""
    case = Case.of(torch.empty(1, 1, 1, head, device="cuda", dtype=dtype), torch.empty(1, 1, 1, value), block)
    reason = kernels.KERNELS[kernels.NAMES.index(kernel)].refuses(case)
    if reason:
        pytest.skip(f"{kernel} {reason}")


def check(
    kernel: str,
    dtype: torch.dtype,
    block: Block,
    rows: int,
    columns: int,
    arrange: Arrange = sequence_major,
    head: int = D,
    value: int = D,
    batch_size: int = B,
    with_others: bool = True,
) -> None:
    """Compare a block whose `out` and `lse` are over more keys than it has: kernels that ignore strides read garbage."""
    sizes = ((H, rows, value), (H, rows, head), (K, columns, head), (K, columns, value), (K, 40, head), (K, 40, value))
    wide = [normal(batch_size, *size, seed=i).to(dtype).double() for i, size in enumerate(sizes)]
    dout, q, k, v = (arrange(x.to(dtype)) for x in wide[:4])
    dout_, q_, k_, v_, other_k, other_v = wide
    expected = kernels.forward(q_, k_, v_, block, "math")
    out, lse = kernels.forward(q, k, v, block, kernel)
    assert (out.dtype, out.shape, lse.shape) == (dtype, dout.shape, q.shape[:3])
    assert error(out.double(), expected[0]) < LIMITS[dtype], "out"
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-3, atol=LIMITS[dtype])
    all_out, all_lse = (x.clone() for x in expected)
    if with_others:
        merge_(all_out, all_lse, *kernels.forward(q_, other_k, other_v, Block(SCALE), "math"))
    expected_grads = kernels.backward(dout_, q_, k_, v_, all_out, all_lse, block, "math")
    strided = arrange(all_lse.to(lse.dtype).unsqueeze(-1)).squeeze(-1)
    grads = kernels.backward(dout, q, k, v, arrange(all_out.to(dtype)), strided, block, kernel)
    for name, found, truth, operand in zip(("dq", "dk", "dv"), grads, expected_grads, (q, k, v), strict=True):
        assert (found.dtype, found.shape) == (dtype, operand.shape)
        assert error(found.double(), truth) < LIMITS[dtype], name


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kernel", CUDA)
def test_block(kernel: str, dtype: torch.dtype, name: str) -> None:
    # FlexAttention compiles for seconds for each shape.
    for shape in ("wide",) if kernel == "flex" else SHAPES:
        rows, columns, arrange = SHAPES[shape]
        block = Block(SCALE, **BLOCKS[name](rows, columns))
        takes(kernel, dtype, block)
        # A row of finfo.min has equal weights among the keys of the block alone.
        with_others = block.mask is None or block.mask.dtype == torch.bool
        check(kernel, dtype, block, rows, columns, arrange, with_others=with_others)


@pytest.mark.parametrize("name", ["plain", "causal", "mask"])
@pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
@pytest.mark.parametrize("kernel", CUDA)
def test_other_dtypes(kernel: str, dtype: torch.dtype, name: str) -> None:
    rows, columns, arrange = SHAPES["square"]
    block = Block(SCALE, **BLOCKS[name](rows, columns))
    takes(kernel, dtype, block)
    check(kernel, dtype, block, rows, columns, arrange)


DIMS = [(8, 8), (12, 20), (60, 100), (80, 80), (96, 64), (128, 128), (136, 72), (192, 128), (256, 256), (320, 64)]


@pytest.mark.parametrize("head, value", DIMS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kernel", CUDA)
def test_head_dims(kernel: str, dtype: torch.dtype, head: int, value: int) -> None:
    block = Block(SCALE, high=0)
    takes(kernel, dtype, block, head, value)
    check(kernel, dtype, block, 200, 200, head=head, value=value)


@pytest.mark.parametrize("lengths", [(301,), (1, 100, 7, 193), (150, 151)], ids=str)
@pytest.mark.parametrize("terms", [{}, {"high": 0}, {"low": -20, "high": 0}, {"low": -30, "high": -2}], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("kernel", CUDA)
def test_documents(kernel: str, dtype: torch.dtype, terms: dict[str, Any], lengths: tuple[int, ...]) -> None:
    block = Block(SCALE, lengths=lengths, **terms)
    takes(kernel, dtype, block)
    if kernel == "flex" and (dtype == FP32 or len(lengths) > 2):
        pytest.skip("compiles for each document")
    for batch_size in (1, 2):
        check(kernel, dtype, block, 301, 301, batch_size=batch_size)


RECTANGLES = {
    "squares": ((0, 100, 0, 100), (100, 201, 100, 201)),
    "longer keys and gaps": ((1, 70, 0, 150), (100, 130, 160, 140), (299, 1, 300, 1)),
    "fewer keys": ((2, 130, 3, 20), (200, 100, 25, 7)),
}


@pytest.mark.parametrize("name", RECTANGLES)
@pytest.mark.parametrize("terms", [{}, {"high": 0}, {"low": -20, "high": 0}], ids=str)
@pytest.mark.parametrize("head, value", [(D, D), (128, 128), (192, 128), (20, 36)])
@pytest.mark.parametrize("kernel", ["cudnn_varlen", "triton"])
def test_rectangles(kernel: str, head: int, value: int, terms: dict[str, Any], name: str) -> None:
    block = Block(SCALE, rectangles=tuple(Rectangle(*part) for part in RECTANGLES[name]), is_varied=True, **terms)
    takes(kernel, BF16, block, head, value)
    for arrange, batch_size in ((sequence_major, 1), (sliced, 2), (head_major, 2)):
        check(kernel, BF16, block, 301, 301, arrange, head, value, batch_size)


def test_calls_of_cudnn_on_other_streams_are_right() -> None:
    """Numbers of rectangles are sent on one stream, and read on others."""

    def of(length: int) -> Block:
        return Block(
            SCALE, rectangles=(Rectangle(0, 1000, 0, 1500), Rectangle(1000, length, 500, length + 500)), high=0
        )

    takes("cudnn_varlen", BF16, of(2), 128, 128)
    q, k = (sequence_major(normal(1, h, 4000, 128, seed=h).bfloat16()) for h in (8, 2))
    streams = [torch.cuda.Stream() for _ in range(3)]
    for length in (3000, 2990):
        found = []
        for i in range(9):
            streams[i % 3].wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(streams[i % 3]):
                found.append(kernels.forward(q, k, k, of(length), "cudnn_varlen")[0])
        torch.cuda.synchronize()
        expected, _ = kernels.forward(*(x.float() for x in (q, k, k)), of(length), "math")
        assert all(torch.equal(out, found[0]) for out in found)
        assert error(found[0].float(), expected) < LIMITS[BF16]


@pytest.mark.parametrize("rows, columns", [(1, 50), (50, 1), (1, 1), (2, 3)])
@pytest.mark.parametrize("terms", [{}, {"high": 0}], ids=str)
@pytest.mark.parametrize("kernel", CUDA)
def test_few_tokens(kernel: str, terms: dict[str, Any], rows: int, columns: int) -> None:
    block = Block(SCALE, **terms)
    takes(kernel, BF16, block)
    if kernel == "flex":
        pytest.skip("compiles for each shape")
    check(kernel, BF16, block, rows, columns)


@pytest.mark.parametrize("terms", [{"high": 0}, {"lengths": (100, 501)}, {"low": -99, "high": 0}], ids=str)
@pytest.mark.parametrize("is_global", [False, True])
@pytest.mark.parametrize("kernel", CUDA)
def test_deterministic_mode(kernel: str, is_global: bool, terms: dict[str, Any]) -> None:
    block = Block(SCALE, is_deterministic=not is_global, **terms)
    torch.use_deterministic_algorithms(is_global)
    try:
        takes(kernel, BF16, block)
        if kernel == "math" and is_global:
            pytest.skip("cuBLAS asks for an environment variable")
        q, k, v = (sequence_major(normal(1, h, 601, D, seed=h).bfloat16()) for h in (8, 2, 2))
        out, lse = kernels.forward(q, k, v, block, kernel)
        first, *others = (kernels.backward(q, q, k, v, out, lse, block, kernel) for _ in range(4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_the_fastest_kernels_are_chosen() -> None:
    def chosen(dtype: torch.dtype, *features: str, head: int = 128) -> str:
        return kernels.choose(Case("cuda", dtype, head, head, frozenset(features))).kernel.name

    if torch.cuda.get_device_capability() >= (9, 0):
        on_hopper = flash.gpu_generation() == 9 and flash.is_installed(flash.FLASH4_PACKAGE.module)
        assert chosen(BF16) == chosen(BF16, "causal") == ("flash4" if on_hopper else "cudnn")
    # Packages that are installed come first.
    assert chosen(BF16, "lengths") in ("cudnn_varlen", "flash3", "flash4", "triton")
    assert chosen(BF16, "lengths", head=256) in ("flash3", "flash")
    assert chosen(BF16, "documents", "dropout") == "triton"
    assert chosen(FP32, "causal") == "triton"
    assert chosen(FP64, "causal") == "math"


def test_flex_attention_compiles_once_for_all_bands() -> None:
    q, k, v = (normal(1, 2, 256, D, seed=i).bfloat16() for i in range(3))
    for high in (0, -7, -20):
        # With a prefix the band is not trimmed, so that the shape stays.
        block = Block(SCALE, high=high, prefix=torch.tensor([9]).cuda())
        out, lse = kernels.forward(q, k, v, block, "flex")
        kernels.backward(q, q, k, v, out, lse, block, "flex")
        if high == 0:
            before = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_ranks_in_lockstep(strategy: str, dtype: torch.dtype) -> None:
    """Four ranks in this process on this GPU, with the kernels that would run."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = llama(**sizes).to("cuda", dtype)
    inputs = {name: x.cuda() for name, x in batch(model, 301).items()}
    limit = {BF16: 8 * torch.finfo(BF16).eps, FP32: 2e-5}[dtype]
    cpcompile.verify(
        model, inputs, world_size=4, tolerance=limit, strategy=strategy, balancer="zig_zag"
    ).raise_if_wrong()


@pytest.mark.parametrize("has_varlen", [False, True])
def test_documents_of_a_batch(has_varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN plans for each shape, so that it computes squares of known sizes, and the Triton kernels what is left of them."""
    if has_varlen and not cudnn_varlen.is_installed("cudnn"):
        pytest.skip("needs nvidia-cudnn-frontend")
    monkeypatch.setattr(cudnn_varlen, "is_installed", lambda name: has_varlen)
    for forget in (kernels.choose, kernels.known_calls):
        forget.cache_clear()
    lengths = (700, 3001, 90, 2560, 1000)
    size = sum(lengths)
    block = Block(SCALE, high=0, lengths=lengths, is_varied=True)
    q, k, v, dout = (normal(1, heads, size, 128, seed=i) for i, heads in enumerate((H, K, K, H)))
    half = [x.bfloat16() for x in (q, k, v, dout)]
    out, lse = kernels.forward(*half[:3], block)
    grads = kernels.backward(half[3], *half[:3], out, lse, block)
    exact = [x.double() for x in half]
    expected, expected_lse = kernels.forward(*exact[:3], block, "math")
    expected_grads = kernels.backward(exact[3], *exact[:3], expected, expected_lse, block, "math")
    for found, wanted in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert error(found.double(), wanted) < LIMITS[BF16]
    calls = kernels.known_calls(block, "auto", size, size, "cuda", BF16, 128, 128)
    found = [(c.kernel.name, c.part.rows.stop - c.part.rows.start) for c in calls]
    for forget in (kernels.choose, kernels.known_calls):
        forget.cache_clear()
    if has_varlen:
        assert found == [("cudnn_varlen", size)]
        return
    assert found == [
        ("triton", 700),
        ("cudnn", 2560),
        ("triton", 441),
        ("triton", 90),
        ("cudnn", 2560),
        ("triton", 1000),
    ]
