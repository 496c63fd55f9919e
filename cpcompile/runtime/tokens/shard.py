"""Shard: tokens between whole tensors and the slices of the ranks.

A dim that holds tokens has size `outer * tokens * inner`, row-major; `outer` follows from the size. Locally,
tokens is `local_length(length, world_size, layout)`, padding slots included.
"""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.record import collective
from cpcompile.runtime.transport import process_group


def factors(x: torch.Tensor, dim: int, inner: int, tokens: int) -> torch.Tensor:
    """Return `x` with `dim` viewed as (outer, tokens, inner)."""
    return torch.unflatten(x, dim, (x.shape[dim] // (tokens * inner), tokens, inner))


def resized(x: torch.Tensor, dim: int, old: int, new: int) -> torch.Tensor:
    """Return an empty tensor like `x` whose `dim` holds `new` tokens in place of `old`."""
    shape = list(x.shape)
    shape[dim] = shape[dim] // old * new
    return x.new_empty(shape)


@torch.library.custom_op("cpcompile::shard_tokens", mutates_args=())
def shard_tokens(
    x: torch.Tensor,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this rank's tokens of a whole tensor. Padding slots repeat the last token, so they are always finite."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    index = order.sources(process_group.rank_in(world_size, group), x.device)
    return factors(x, dim, inner, length).index_select(dim + 1, index).flatten(dim, dim + 2)


@shard_tokens.register_fake
def _(x: torch.Tensor, dim: int, inner: int, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return resized(x, dim, length, local_length(length, world_size, layout))


@torch.library.custom_op("cpcompile::shard_tokens_backward", mutates_args=())
def shard_tokens_backward(
    grad: torch.Tensor,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the whole tensor: this rank's tokens, 0 elsewhere."""
    order, rank = TokenOrder.of(length, world_size, layout, bounds), process_group.rank_in(world_size, group)
    grad = factors(grad, dim, inner, order.local_length)
    whole = grad.new_zeros(*grad.shape[: dim + 1], length, *grad.shape[dim + 2 :])
    index, real = order.sources(rank, grad.device), order.num_held(rank)
    whole.index_copy_(dim + 1, index[:real], grad.narrow(dim + 1, 0, real))
    # Padding slots all came from the last token. Summed apart, the result does not depend on the order of
    # atomic adds.
    padding = grad.narrow(dim + 1, real, grad.shape[dim + 1] - real)
    whole.narrow(dim + 1, length - 1, 1).add_(padding.sum(dim + 1, keepdim=True))
    return whole.flatten(dim, dim + 2)


@shard_tokens_backward.register_fake
def _(grad: torch.Tensor, dim: int, inner: int, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return resized(grad, dim, local_length(length, world_size, layout), length)


@collective("cpcompile::gather_tokens")
def gather_tokens(
    x: torch.Tensor,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the whole tensor in the user's order, on every rank, without padding."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    local = factors(x, dim, inner, order.local_length)
    stacked = process_group.all_gather(local, world_size, group).movedim(0, dim + 1).flatten(dim + 1, dim + 2)
    return stacked.index_select(dim + 1, order.inverse(x.device)).flatten(dim, dim + 2)


@gather_tokens.register_fake
def _(x: torch.Tensor, dim: int, inner: int, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return resized(x, dim, local_length(length, world_size, layout), length)


@collective("cpcompile::gather_tokens_backward")
def gather_tokens_backward(
    grad: torch.Tensor,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this rank's tokens of the sum over ranks of `grad`; padding slots get 0."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    whole = factors(grad, dim, inner, length)
    laid = whole.new_zeros(*whole.shape[: dim + 1], world_size * order.local_length, *whole.shape[dim + 2 :])
    laid.index_copy_(dim + 1, order.inverse(grad.device), whole)
    stacked = torch.unflatten(laid, dim + 1, (world_size, -1)).movedim(dim + 1, 0)
    return process_group.reduce_scatter(stacked, world_size, group).flatten(dim, dim + 2).contiguous()


@gather_tokens_backward.register_fake
def _(grad: torch.Tensor, dim: int, inner: int, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return resized(grad, dim, length, local_length(length, world_size, layout))


@torch.library.custom_op("cpcompile::fill_padding", mutates_args=())
def fill_padding(
    x: torch.Tensor,
    dim: int,
    inner: int,
    value: float,
    front: int,
    back: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a copy of a local tensor with `value` in its padding slots and in the first `front` and last `back` tokens."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    position = order.positions(process_group.rank_in(world_size, group), x.device)
    outside = (position < front) | (position >= length - back)
    filled = x.clone(memory_format=torch.contiguous_format)
    slots = factors(filled, dim, inner, len(position))
    slots.masked_fill_(outside.view(-1, *(1,) * (x.dim() - dim)), value)
    return filled


@fill_padding.register_fake
def _(x: torch.Tensor, *settings: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.settings = inputs[1:]


def _shard_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return shard_tokens_backward(grad, *ctx.settings), *(None,) * 7


def _gather_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return gather_tokens_backward(grad, *ctx.settings), *(None,) * 7


def _fill_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dim, inner, _, *rest = ctx.settings
    return fill_padding(grad, dim, inner, 0.0, *rest), *(None,) * 10


shard_tokens.register_autograd(_shard_backward, setup_context=_keep_settings)
gather_tokens.register_autograd(_gather_backward, setup_context=_keep_settings)
fill_padding.register_autograd(_fill_backward, setup_context=_keep_settings)
