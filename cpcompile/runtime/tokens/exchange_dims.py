"""Exchange of dims: a rank gives the tokens that it has for all tokens of a part of another dim.

    x [.. S/P .. C ..] -> [.. S .. C/P ..]

The other dim is sharded as tokens are, in the same layout: it may be channels, or tokens too (rows of pairs become columns).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.record import collective
from cpcompile.runtime.transport import process_group

Tensor = torch.Tensor


def swapped(parts: Sequence[Tensor], group: str) -> list[Tensor]:
    """Return what each rank has for this one, of parts for each rank that all have the same shape."""
    sent = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
    numel, shape = sent[0].numel(), sent[0].shape
    flat = [part.reshape(-1) for part in sent]
    received = process_group.all_to_all(flat, [numel] * len(flat), len(flat), group)
    arrived = [part.view(shape) for part in received]
    return [torch.view_as_complex(part) for part in arrived] if parts[0].is_complex() else arrived


@collective("cpcompile::exchange_dims")
def exchange_dims(
    x: Tensor,
    dim: int,
    length: int,
    to: int,
    to_length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
    to_bounds: Tensor | None = None,
) -> Tensor:
    """Return this rank's part of the dim `to`, with all tokens of the dim `dim`, of which `x` has those of this rank.

    Padding slots of `to` repeat its last element, so that they are always finite.
    """
    order, target = (
        TokenOrder.of(length, world_size, layout, bounds),
        TokenOrder.of(to_length, world_size, layout, to_bounds),
    )
    parts = [x.index_select(to, target.sources(rank, x.device)) for rank in range(world_size)]
    return torch.cat(swapped(parts, group), dim).index_select(dim, order.inverse(x.device))


@exchange_dims.register_fake
def _(x: Tensor, dim: int, length: int, to: int, to_length: int, layout: str, world_size: int, *rest: Any) -> Tensor:
    shape = list(x.shape)
    shape[dim], shape[to] = length, local_length(to_length, world_size, layout)
    return x.new_empty(shape)


@collective("cpcompile::exchange_dims_backward")
def exchange_dims_backward(
    grad: Tensor,
    dim: int,
    length: int,
    to: int,
    to_length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
    to_bounds: Tensor | None = None,
) -> Tensor:
    """Return the gradient of this rank's tokens; padding slots get 0."""
    order, target = (
        TokenOrder.of(length, world_size, layout, bounds),
        TokenOrder.of(to_length, world_size, layout, to_bounds),
    )
    shape = list(grad.shape)
    shape[dim] = world_size * order.local_length
    laid = grad.new_zeros(shape).index_copy_(dim, order.inverse(grad.device), grad)
    arrived = torch.cat(swapped(laid.chunk(world_size, dim), group), to)
    slots = torch.cat([target.positions(rank, grad.device) for rank in range(world_size)]).argsort()
    result = arrived.index_select(to, slots[:to_length])
    # Padding slots all came from the last element.
    padding = arrived.index_select(to, slots[to_length:])
    result.narrow(to, to_length - 1, 1).add_(padding.sum(to, keepdim=True))
    return result


@exchange_dims_backward.register_fake
def _(grad: Tensor, dim: int, length: int, to: int, to_length: int, layout: str, world_size: int, *rest: Any) -> Tensor:
    shape = list(grad.shape)
    shape[dim], shape[to] = local_length(length, world_size, layout), to_length
    return grad.new_empty(shape)


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.settings = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return exchange_dims_backward(grad, *ctx.settings), *(None,) * 9


exchange_dims.register_autograd(_backward, setup_context=_keep_settings)
