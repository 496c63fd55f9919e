"""Fourier transforms of several dims are opened into transforms of one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes.open_transforms import OPENED, open_transforms

fft = torch.fft
TRANSFORMS: list[Callable[[Tensor], Tensor]] = [
    lambda x: fft.fft2(x),
    lambda x: fft.ifft2(x, s=(4, -1), norm="ortho"),
    lambda x: fft.rfft2(x, dim=(0, 1)),
    lambda x: fft.irfft2(fft.rfft2(x), s=(5, 7)),
    lambda x: fft.fftn(x, norm="forward"),
    lambda x: fft.ifftn(x, s=(3, 9)),
    lambda x: fft.rfftn(x, s=(6, 4), dim=(-1, 0)),
    lambda x: fft.irfftn(x.to(torch.complex128), dim=(2, 0, 1)),
]


@pytest.mark.parametrize("function", TRANSFORMS)
def test_keeps_numerics(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 5, 7, dtype=torch.float64, requires_grad=True)
    gm = make_fx(function, tracing_mode="fake", pre_dispatch=True)(x)
    assert open_transforms(gm) >= 1
    gm.graph.lint()
    gm.recompile()
    assert not [node for node in gm.graph.nodes if node.target in OPENED]
    text = str(gm.graph)
    assert (open_transforms(gm), str(gm.graph)) == (0, text)
    outs = gm(x), function(x)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(out.abs().square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_leaves_transforms_of_one_dim_alone() -> None:
    gm = make_fx(lambda x: fft.irfft(fft.rfft(x, dim=0), dim=1), pre_dispatch=True)(torch.rand(4, 6))
    text = str(gm.graph)
    assert (open_transforms(gm), str(gm.graph)) == (0, text)
