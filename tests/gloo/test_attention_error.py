"""Rounding: in bfloat16 no strategy is much further from float64 than the kernel on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile.runtime  # registers the operators
from cpcompile.balance.layout import positions

assert cpcompile.runtime
LENGTH, SCALE = 512, 0.2
LIMIT = 1.5  # rounding of two partial results and of their sum, against one rounding: sqrt(2) at worst, if weights are equal


def inputs() -> list[torch.Tensor]:
    """Return q, k, v and dout of the whole sequence."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, heads, LENGTH, 32) for heads in (4, 2, 2, 4)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def results(operator: Any, tensors: list[torch.Tensor], **axis: Any) -> list[torch.Tensor]:
    """Return out, dq, dk and dv of causal attention."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    out = operator(*leaves, None, None, None, SCALE, True, 0, 0.0, **axis)
    out = out[0] if isinstance(out, (tuple, list)) else out
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def attend(rank: Any, strategy: str) -> list[torch.Tensor]:
    """Run a strategy on this rank's tokens."""
    at = positions(LENGTH, rank.rank, rank.world_size, "zig_zag")
    axis = {"length": LENGTH, "layout": "zig_zag", "world_size": rank.world_size, "group": rank.group}
    operator = getattr(torch.ops.cpcompile, f"{strategy}_attention")
    return results(operator, [x[:, :, at] for x in inputs()], **axis)


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_error_is_near_that_of_the_kernel(pool: Any, strategy: str, world_size: int) -> None:
    expected = results(torch.ops.cpcompile.attention, [x.double() for x in inputs()])
    alone = results(torch.ops.cpcompile.attention, inputs())
    at = torch.cat([positions(LENGTH, rank, world_size, "zig_zag") for rank in range(world_size)])
    parts = zip(*pool.run(world_size, attend, strategy), strict=True)
    for name, part, truth, kernel in zip(("out", "dq", "dk", "dv"), parts, expected, alone, strict=True):
        found = torch.empty_like(truth).index_copy_(2, at, torch.cat(part, 2).double())
        assert rms(found - truth) < LIMIT * rms(kernel - truth), name
