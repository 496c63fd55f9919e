"""CUDA kernels behind the attention operators, in one process on one GPU, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cpcompile
from cpcompile.layout import LAYOUTS, positions
from cpcompile.runtime import kernel_math, kernels
from cpcompile.runtime.kernels import Case, Kernel
from tests.models import batch, error, llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

SCALE = 0.2
CUDA = [kernel for kernel in kernels.KERNELS if kernel.name in ("cudnn", "cuda_flash", "cuda_efficient")]
MATH = kernels.KERNELS[-1]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Attention rounds the weights and its results once each, and dq, dk, dv also their products.
LIMITS = {dtype: 4 * torch.finfo(dtype).eps for dtype in DTYPES} | {torch.float32: 1e-5}


def head_major(x: Tensor) -> Tensor:
    """Return `x` with heads before tokens in memory."""
    return x.contiguous()


def sequence_major(x: Tensor) -> Tensor:
    """Return `x` with tokens before heads in memory, as a projection makes it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x: Tensor) -> Tensor:
    """Return `x` as rows of a longer tensor, as the chunks of zig-zag are."""
    return torch.cat([torch.zeros_like(x), x, torch.zeros_like(x)], 2).narrow(2, x.shape[2], x.shape[2])


def takes(kernel: Kernel, dtype: torch.dtype, mask: str) -> None:
    """Skip what the kernel refuses."""
    reason = kernel.refuses(Case("cuda", dtype, 64, 64, mask))
    if reason:
        pytest.skip(f"{kernel.name} {reason}")


def normal(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


@pytest.mark.parametrize("has_mask", [False, True], ids=["whole", "mask"])
@pytest.mark.parametrize("arrange", [head_major, sequence_major, sliced], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", CUDA, ids=lambda kernel: kernel.name)
def test_block(kernel: Kernel, dtype: torch.dtype, arrange: Callable[[Tensor], Tensor], has_mask: bool) -> None:
    """A block whose out and lse are those of all keys, in every memory order: kernels that ignore strides read garbage."""
    takes(kernel, dtype, "bool" if has_mask else "none")
    q, k, v, dout = (
        normal(2, heads, rows, 64, dtype=dtype, seed=i)
        for i, (heads, rows) in enumerate([(4, 77), (2, 150), (2, 150), (4, 77)])
    )
    mask = None
    if has_mask:
        mask = torch.rand(2, 1, 77, 150, generator=torch.Generator().manual_seed(9)).cuda() > 0.5
        mask[0, 0, 5] = False
    settings = {"mask": mask, "scale": SCALE, "is_causal": False, "softcap": 0.0}
    wide = [x.double() for x in (q, k, v)]
    expected, expected_lse = kernel_math.forward(*wide, **settings)
    expected_grads = kernel_math.backward(dout.double(), *wide, expected, expected_lse, **settings)
    out, lse = kernel.forward(*map(arrange, (q, k, v)), **settings)
    assert error(out.double(), expected) < LIMITS[dtype]
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=LIMITS[dtype])
    strided = arrange(lse.unsqueeze(-1)).squeeze(-1)
    grads = kernel.backward(*map(arrange, (dout, q, k, v, expected.to(dtype))), strided, **settings)
    for name, found, truth in zip(("dq", "dk", "dv"), grads, expected_grads, strict=True):
        assert error(found.double(), truth) < LIMITS[dtype], name


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 40},
    "documents": {"documents": True},
    "padding": {"key_padding": True},
}


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", CUDA, ids=lambda kernel: kernel.name)
def test_operators(
    kernel: Kernel, dtype: torch.dtype, strategy: str, layout: str, masked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operators on one rank, which merge chunks as on several; operands as a model makes them, sequence-major."""
    takes(kernel, dtype, "none")
    length = 193
    documents = (torch.arange(length) // 70).expand(2, -1).cuda() if MASKS[masked].get("documents") else None
    padding = (torch.arange(length) >= torch.tensor([[0], [31]])).cuda() if MASKS[masked].get("key_padding") else None
    slots = positions(length, 0, 1, layout)
    index = slots.clamp(max=length - 1).cuda()
    real = (slots < length).cuda()
    q, k, v, dout = (
        sequence_major(normal(2, heads, length, 64, dtype=dtype, seed=i).index_select(2, index))
        for i, heads in enumerate([4, 2, 2, 4])
    )
    terms = (None, documents, padding, SCALE, True, MASKS[masked].get("window", 0), 0.0)

    def run(x: tuple[Tensor, ...], own: Kernel) -> list[Tensor]:
        monkeypatch.setattr(kernels, "KERNELS", (own, MATH))
        leaves = [t.detach().requires_grad_() for t in x[:3]]
        operator = getattr(torch.ops.cpcompile, f"{strategy}_attention")
        out = operator(*leaves, *terms, length, layout, 1, "")[0]
        return [out.detach(), *torch.autograd.grad(out, leaves, x[3])]

    found = run((q, k, v, dout), kernel)
    expected = run(tuple(x.double() for x in (q, k, v, dout)), MATH)
    for name, x, truth in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        assert not x[:, :, ~real].any(), f"{name}: padding"
        assert error(x.double(), truth) < LIMITS[dtype], name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_ranks_in_lockstep(strategy: str, dtype: torch.dtype) -> None:
    """Four ranks in this process on this GPU, with the kernels that would run."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = llama(**sizes).to("cuda", dtype)
    inputs = {name: x.cuda() for name, x in batch(model, 301).items()}
    limit = {torch.bfloat16: 8 * torch.finfo(torch.bfloat16).eps, torch.float32: 2e-5}[dtype]
    cpcompile.verify(
        model, inputs, world_size=4, tolerance=limit, strategy=strategy, balancer="zig_zag"
    ).raise_if_wrong()
