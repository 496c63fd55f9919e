"""Reductions over the ranks, with the adjoints that cpcompile's gradients rest on (torch's own have changed between versions)."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.runtime.record import collective
from cpcompile.runtime.transport import process_group


@collective("cpcompile::all_reduce")
def all_reduce(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return the sum of `x` over the ranks. Its adjoint is itself: every rank's result depends on every rank's addend."""
    return process_group.all_reduce(x, world_size, group)


@all_reduce.register_fake
def _(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.world_size, ctx.group = inputs


def _all_reduce_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return all_reduce(grad, ctx.world_size, ctx.group), None, None


all_reduce.register_autograd(_all_reduce_backward, setup_context=_keep_group)


@torch.library.custom_op("cpcompile::scale_gradient", mutates_args=())
def scale_gradient(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Return a copy of `x` whose gradient is multiplied by `scale` on the way back."""
    return x.clone()


@scale_gradient.register_fake
def _(x: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty_like(x)


def _keep_scale(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.scale = inputs[1]


def _scale_gradient_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return grad * ctx.scale, None


scale_gradient.register_autograd(_scale_gradient_backward, setup_context=_keep_scale)


@collective("cpcompile::stack_ranks")
def stack_ranks(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return every rank's `x`, stacked in the order of the ranks: `[world_size, *x.shape]`."""
    return process_group.all_gather(x, world_size, group) if world_size > 1 else torch.stack([x])


@stack_ranks.register_fake
def _(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    return x.new_empty(world_size, *x.shape)


@collective("cpcompile::stack_ranks_backward")
def stack_ranks_backward(grad: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return the sum over ranks of their gradients of this rank's `x`."""
    if world_size > 1:
        return process_group.reduce_scatter(grad, world_size, group)
    return grad[0].clone(memory_format=torch.contiguous_format)


@stack_ranks_backward.register_fake
def _(grad: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    return grad.new_empty(grad.shape[1:])


def _stack_ranks_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return stack_ranks_backward(grad, ctx.world_size, ctx.group), None, None


stack_ranks.register_autograd(_stack_ranks_backward, setup_context=_keep_group)
