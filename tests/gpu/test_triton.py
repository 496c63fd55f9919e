"""The kernels written in Triton, on one GPU: every block, dtype and head dim, the same bits, no waiting, far rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from cpcompile.runtime.kernels import merge, triton_backward, triton_forward, triton_merge
from cpcompile.runtime.kernels.block import Block, Dropout
from tests import triton_cases
from tests.models import error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch says so once in each process that forbids waiting.
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Each feature in a block that is large enough for blocks of columns that are seen wholly.
SETTINGS = [
    "causal",
    "window",
    "both sides",
    "mask",
    "documents",
    "few documents",
    "key padding",
    "prefix",
    "everything",
]


@pytest.mark.parametrize("name", triton_cases.BLOCKS)
def test_block(name: str) -> None:
    triton_cases.check(name, 333, 450, 64, 64, BF16, "cuda")


@pytest.mark.parametrize("name", SETTINGS)
def test_large_block(name: str) -> None:
    triton_cases.check(name, 1500, 1536, 128, 128, BF16, "cuda")


@pytest.mark.parametrize("name", triton_cases.OF_LENGTHS)
@pytest.mark.parametrize("size", [333, 1536])
def test_lengths(size: int, name: str) -> None:
    triton_cases.check(name, size, size, 128, 128, BF16, "cuda")


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("name", ["window", "float mask", "everything"])
def test_dtype(name: str, dtype: torch.dtype) -> None:
    triton_cases.check(name, 333, 450, 64, 64, dtype, "cuda")


@pytest.mark.parametrize("width, value_width", [(8, 8), (16, 16), (32, 48), (80, 80), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_head_dims(name: str, dtype: torch.dtype, width: int, value_width: int) -> None:
    if dtype == FP32 and name == "everything" and width not in (96, 256):
        pytest.skip("compiles for long and says little")
    triton_cases.check(name, 200, 300, width, value_width, dtype, "cuda")


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 700), (700, 1), (128, 128), (129, 127), (64, 1024), (1024, 64)])
@pytest.mark.parametrize("name", ["causal", "both sides"])
def test_shapes(name: str, rows: int, columns: int) -> None:
    triton_cases.check(name, rows, columns, 64, 64, BF16, "cuda")


def attention(length: int, width: int = 128, heads: int = 4, dtype: torch.dtype = BF16) -> tuple[Tensor, ...]:
    """Return dout, q, k, v of an attention of two key heads."""
    torch.manual_seed(0)
    sizes = (heads, heads, 2, 2)
    made = (torch.randn(1, length, n, width, device="cuda", dtype=dtype).transpose(1, 2) for n in sizes)
    return tuple(made)


def run(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, ...]:
    out, lse = triton_forward.forward(q, k, v, block)
    return out, lse, *triton_backward.backward(dout, q, k, v, out, lse, block)


def blocks(length: int) -> dict[str, Block]:
    seed = torch.tensor(5, device="cuda")
    ids = (torch.arange(length, device="cuda") * 7 // length)[None]
    return {
        "causal": Block(0.1, high=0),
        "dropout": Block(0.1, high=0, dropout=Dropout(0.2, seed, 1, 0, 0, 4, 0, 0, length, length)),
        "documents": Block(0.1, high=0, documents=(ids, ids), key_padding=ids != 2),
        "lengths": Block(0.1, high=0, lengths=(length // 5, length - length // 5)),
        "prefix": Block(0.1, high=0, prefix=torch.tensor([300], device="cuda"), slopes=torch.rand(4, device="cuda")),
    }


@pytest.mark.parametrize("name", ["causal", "dropout", "documents", "lengths", "prefix"])
def test_same_bits(name: str) -> None:
    x = attention(4096)
    block = blocks(4096)[name]
    first = run(*x, block)
    for _ in range(5):
        for a, b in zip(run(*x, block), first, strict=True):
            assert torch.equal(a, b)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Forbid what waits for the device."""
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["causal", "dropout", "documents", "lengths", "prefix"])
def test_graph(name: str) -> None:
    """Forward and backward wait for nothing, and can be captured and replayed on other values."""
    dout, q, k, v = attention(1000)
    block = blocks(1000)[name]
    run(dout, q, k, v, block)
    with no_waiting():
        run(dout, q, k, v, block)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(dout, q, k, v, block)
    for x in (dout, q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    for found, expected in zip(captured, run(dout, q, k, v, block), strict=True):
        assert torch.equal(found, expected)


def test_far_rows() -> None:
    """Offsets beyond 2^31: the last rows of a long sequence in memory that all heads share."""
    length, window, tail = 600_000, 64, 500
    memory = torch.randn(1, length, 32 * 128, device="cuda", dtype=BF16).view(1, length, 32, 128).transpose(1, 2)
    dout, q, k, v = memory[:, 4:8], memory[:, 28:32], memory[:, 10:12], memory[:, 20:22]
    block = Block(0.1, high=0, low=1 - window)
    found = run(dout, q, k, v, block)
    near = run(*(x[:, :, -tail:].clone() for x in (dout, q, k, v)), block)
    for a, b in zip(found, near, strict=True):
        # The first rows of the tail miss keys.
        assert error(a[:, :, 2 * window - tail :].double(), b[:, :, 2 * window - tail :].double()) < 1e-2


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("own", [BF16, FP32], ids=str)
def test_merge(own: torch.dtype, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    held = torch.randn(2, 1000, 6, 96, device="cuda", dtype=own).transpose(1, 2)
    block_out = torch.randn(2, 700, 6, 96, device="cuda", dtype=dtype).transpose(1, 2)
    lse, block_lse = torch.randn(2, 6, 1000, device="cuda"), torch.randn(2, 6, 700, device="cuda")
    lse[0, :, 200:300] = block_lse[0, :, 150:250] = -torch.inf
    out, out_lse = held[:, :, 100:800], lse[:, :, 100:800]
    expected, expected_lse = out.double(), out_lse.double()
    merge.merge_(expected, expected_lse, block_out.double(), block_lse.double())
    total = out.clone()
    triton_merge.merge_(out, out_lse, block_out, block_lse)
    tolerance = torch.finfo(own).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(out_lse.double(), expected_lse, rtol=1e-6, atol=1e-6)
    wanted = (total.float() + block_out.float()).to(own)
    triton_merge.add_(total, block_out)
    assert torch.equal(total, wanted)
