"""Pick: a few tokens, known by their positions, between the ranks that hold them and all ranks. Nothing is sent."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile._torch import assert_on_device
from cpcompile.balance.layout import local_length, rank_chunks
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Span
from cpcompile.runtime.tokens.moves import move_within
from cpcompile.runtime.tokens.shard import factors, resized
from cpcompile.runtime.transport import process_group


@torch.library.custom_op("cpcompile::pick_tokens", mutates_args=())
def pick_tokens(
    x: torch.Tensor,
    dim: int,
    start: int,
    count: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this rank's addend of the tokens [start, start + count): its own in their places, 0 elsewhere."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    local = factors(x, dim, 1, order.local_length)
    picked = local.new_zeros(*local.shape[: dim + 1], count, *local.shape[dim + 2 :])
    own = order.spans[process_group.rank_in(world_size, group)]
    return move_within(local, picked, dim + 1, own, [Span(0, start, count)]).flatten(dim, dim + 2)


@pick_tokens.register_fake
def _(
    x: torch.Tensor, dim: int, start: int, count: int, length: int, layout: str, world_size: int, *rest: Any
) -> torch.Tensor:
    return resized(x, dim, local_length(length, world_size, layout), count)


@torch.library.custom_op("cpcompile::pick_tokens_backward", mutates_args=())
def pick_tokens_backward(
    grad: torch.Tensor,
    dim: int,
    start: int,
    count: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the local tokens: that of the picked ones in their slots, 0 elsewhere."""
    grad = factors(grad, dim, 1, count)
    order = TokenOrder.of(length, world_size, layout, bounds)
    local = grad.new_zeros(*grad.shape[: dim + 1], order.local_length, *grad.shape[dim + 2 :])
    own = order.spans[process_group.rank_in(world_size, group)]
    return move_within(grad, local, dim + 1, [Span(0, start, count)], own).flatten(dim, dim + 2)


@pick_tokens_backward.register_fake
def _(
    grad: torch.Tensor, dim: int, start: int, count: int, length: int, layout: str, world_size: int, *rest: Any
) -> torch.Tensor:
    return resized(grad, dim, count, local_length(length, world_size, layout))


@torch.library.custom_op("cpcompile::put_tokens", mutates_args=())
def put_tokens(
    x: torch.Tensor,
    values: torch.Tensor,
    dim: int,
    start: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a copy of the local `x` in which the tokens from `start` on are `values`, which every rank has whole."""
    result = x.clone(memory_format=torch.contiguous_format)
    order = TokenOrder.of(length, world_size, layout, bounds)
    local = factors(result, dim, 1, order.local_length)
    outer = local.shape[dim]
    count = values.shape[dim] // outer
    own = order.spans[process_group.rank_in(world_size, group)]
    move_within(factors(values, dim, 1, count), local, dim + 1, [Span(0, start, count)], own)
    return result


@put_tokens.register_fake
def _(
    x: torch.Tensor, values: torch.Tensor, dim: int, start: int, length: int, layout: str, world_size: int, *rest: Any
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("cpcompile::local_slots", mutates_args=())
def local_slots(
    index: torch.Tensor,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the slot of each position of `index`, int64, or -1 where another rank holds it.

    Negative positions count from the end. Raises for those outside the sequence, as indexing does.
    """
    assert_on_device(((index >= -length) & (index < length)).all(), f"an index is out of range for {length} tokens")
    order, rank = TokenOrder.of(length, world_size, layout, bounds), process_group.rank_in(world_size, group)
    slots = order.inverse(index.device)[index.long()] - rank * order.local_length
    return torch.where((slots >= 0) & (slots < order.local_length), slots, -1).contiguous()


@local_slots.register_fake
def _(index: torch.Tensor, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return torch.empty_like(index, dtype=torch.int64, memory_format=torch.contiguous_format)


@torch.library.custom_op("cpcompile::positions", mutates_args=())
def positions(
    like: torch.Tensor, length: int, layout: str, world_size: int, group: str, bounds: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the position of each slot of this rank, int64 `[local_length]` on the device of `like`; see `layout.py`."""
    order = TokenOrder.of(length, world_size, layout, bounds)
    return order.positions(process_group.rank_in(world_size, group), like.device)


@positions.register_fake
def _(like: torch.Tensor, length: int, layout: str, world_size: int, *rest: Any) -> torch.Tensor:
    return like.new_empty(local_length(length, world_size, layout), dtype=torch.int64)


@torch.library.custom_op("cpcompile::chunk_indices", mutates_args=())
def chunk_indices(like: torch.Tensor, layout: str, world_size: int, group: str) -> torch.Tensor:
    """Return the numbers of the chunks of this rank, int64, in the order in which it holds them."""
    held = rank_chunks(process_group.rank_in(world_size, group), world_size, layout)
    # Not torch.tensor, which would make the device wait for the host.
    return torch.cat([torch.full((1,), number, device=like.device) for number in held])


@chunk_indices.register_fake
def _(like: torch.Tensor, layout: str, world_size: int, group: str) -> torch.Tensor:
    return like.new_empty(len(rank_chunks(0, world_size, layout)), dtype=torch.int64)


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.settings = inputs[1:]


def _pick_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return pick_tokens_backward(grad, *ctx.settings), *(None,) * 8


def _keep_values(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, values, dim, start, length, layout, world_size, *_ = inputs
    outer = x.shape[dim] // local_length(length, world_size, layout)
    ctx.settings = dim, start, values.shape[dim] // outer, *inputs[4:]


def _put_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dim, start, _, *axis = ctx.settings
    values = pick_tokens(grad, *ctx.settings)
    return put_tokens(grad, torch.zeros_like(values), dim, start, *axis), values, *(None,) * 7


pick_tokens.register_autograd(_pick_backward, setup_context=_keep_settings)
put_tokens.register_autograd(_put_backward, setup_context=_keep_values)
