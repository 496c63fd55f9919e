"""Exchange: tokens go to other slots, or each rank sees some of its neighbours' tokens too.

Only the tokens that change rank travel. `dim` holds `outer * tokens * inner`, as everywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.balance.layout import chunk_length, local_length, rank_chunks
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Span
from cpcompile.runtime.record import collective
from cpcompile.runtime.tokens.moves import Route, exchange
from cpcompile.runtime.tokens.shard import factors, resized


def halo_spans(before: int, after: int, length: int, rank: int, world_size: int, layout: str) -> tuple[Span, ...]:
    """Return the tokens in the chunks of `rank` with their halos; slots outside the sequence are in no span."""
    size = chunk_length(length, world_size, layout)
    wide = before + size + after
    chunks = enumerate(rank_chunks(rank, world_size, layout))
    return tuple(Span(i * wide, chunk * size - before, wide).between(0, length) for i, chunk in chunks)


def halo_length(before: int, after: int, length: int, world_size: int, layout: str) -> int:
    """Return the slots of one rank's chunks with their halos. Works on symbolic lengths."""
    num_chunks = len(rank_chunks(0, world_size, layout))
    return num_chunks * (before + chunk_length(length, world_size, layout) + after)


def route_of(sign: int, offset: int, wrap: bool, length: int) -> Route:
    """Return the route of `move_tokens`: within one period of the positions, going round is one step of the length."""
    return Route(sign, (offset % length, offset % length - sign * length) if wrap else (offset,))


@collective("cpcompile::move_tokens")
def move_tokens(
    x: torch.Tensor,
    dim: int,
    inner: int,
    sign: int,
    offset: int,
    wrap: bool,
    fill: float,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return local tokens of which position p is token `sign * p + offset` of `x`; `sign` is 1 or -1.

    With `wrap` that is taken modulo the length; without, positions whose token is outside the sequence are `fill`.
    Padding slots are `fill`.
    """
    order = TokenOrder.of(length, world_size, layout, bounds)
    local, spans = factors(x, dim, inner, order.local_length), order.spans
    result = local.new_full(local.shape, fill)
    route = route_of(sign, offset, wrap, length)
    return exchange(local, result, dim + 1, spans, spans, route, group).flatten(dim, dim + 2)


@move_tokens.register_fake
def _(x: torch.Tensor, *settings: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@collective("cpcompile::halo_tokens")
def halo_tokens(
    x: torch.Tensor, dim: int, before: int, after: int, length: int, layout: str, world_size: int, group: str
) -> torch.Tensor:
    """Return each chunk with the `before` tokens that precede it and the `after` that follow, of whatever ranks.

    What is outside the sequence is 0, padding slots included.
    """
    local = factors(x, dim, 1, local_length(length, world_size, layout))
    targets = [halo_spans(before, after, length, rank, world_size, layout) for rank in range(world_size)]
    slots = halo_length(before, after, length, world_size, layout)
    result = local.new_zeros(*local.shape[: dim + 1], slots, *local.shape[dim + 2 :])
    sources = TokenOrder(length, world_size, layout).spans
    return exchange(local, result, dim + 1, sources, targets, Route(), group).flatten(dim, dim + 2)


@halo_tokens.register_fake
def _(
    x: torch.Tensor, dim: int, before: int, after: int, length: int, layout: str, world_size: int, group: str
) -> torch.Tensor:
    slots = halo_length(before, after, length, world_size, layout)
    return resized(x, dim, local_length(length, world_size, layout), slots)


@collective("cpcompile::halo_tokens_backward")
def halo_tokens_backward(
    grad: torch.Tensor, dim: int, before: int, after: int, length: int, layout: str, world_size: int, group: str
) -> torch.Tensor:
    """Return the sum, at each token's owner, of the gradients of all its copies."""
    grad = factors(grad, dim, 1, halo_length(before, after, length, world_size, layout))
    sources = [halo_spans(before, after, length, rank, world_size, layout) for rank in range(world_size)]
    slots = local_length(length, world_size, layout)
    result = grad.new_zeros(*grad.shape[: dim + 1], slots, *grad.shape[dim + 2 :])
    targets = TokenOrder(length, world_size, layout).spans
    return exchange(grad, result, dim + 1, sources, targets, Route(), group, is_sum=True).flatten(dim, dim + 2)


@halo_tokens_backward.register_fake
def _(
    grad: torch.Tensor, dim: int, before: int, after: int, length: int, layout: str, world_size: int, group: str
) -> torch.Tensor:
    slots = halo_length(before, after, length, world_size, layout)
    return resized(grad, dim, slots, local_length(length, world_size, layout))


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.settings = inputs[1:]


def _move_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dim, inner, sign, offset, wrap, _, *axis = ctx.settings
    return move_tokens(grad, dim, inner, sign, -sign * offset, wrap, 0.0, *axis), *(None,) * 11


def _halo_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return halo_tokens_backward(grad, *ctx.settings), *(None,) * 7


move_tokens.register_autograd(_move_backward, setup_context=_keep_settings)
halo_tokens.register_autograd(_halo_backward, setup_context=_keep_settings)
