"""Rearrange: elements of a dim go from one arrangement to another, each to the rank that holds it there.

What joins sequences, cuts ranges out of them and groups tokens is a rearrangement; only elements that change rank travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.layout import local_length
from cpcompile.runtime.record import collective
from cpcompile.runtime.tokens.moves import Route, exchange


def slots_of(arrangement: Sequence[int], layout: str, world_size: int) -> int:
    """Return the slots of one rank. Works on symbolic lengths."""
    pairs = zip(arrangement[::2], arrangement[1::2], strict=True)
    return sum(local_length(tokens, world_size, layout) * elements for tokens, elements in pairs)


@collective("cpcompile::rearrange_tokens")
def rearrange_tokens(
    x: torch.Tensor,
    dim: int,
    held: Sequence[int],
    wanted: Sequence[int],
    offset: int,
    fills: bool,
    layout: str,
    world_size: int,
    group: str,
    wanted_layout: str = "",
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return local elements in the arrangement `wanted`, of which position p is position `p + offset` of `x`.

    Args:
        x: local elements in the arrangement `held` along `dim`, perhaps several times behind one another.
        held: `[tokens, elements of a token, tokens, elements of a token, ...]`, see `Arrangement`.
        wanted: likewise.
        offset: positions that `x` does not have are 0.
        fills: padding slots repeat the last token, so that they are as finite as the others; otherwise they are 0.
        wanted_layout: the layout of `wanted`, where it is not `layout`.
        bounds: the documents, for the one of both layouts that follows them.
    """
    old = Arrangement.of(held, world_size, layout, bounds)
    new = Arrangement.of(wanted, world_size, wanted_layout or layout, bounds)
    local = torch.unflatten(x, dim, (-1, old.local_length))
    shape = list(local.shape)
    shape[dim + 1] = new.local_length
    targets = new.spans_with_padding if fills else new.spans
    route = Route(1, (offset,))
    return exchange(local, local.new_zeros(shape), dim + 1, old.spans, targets, route, group).flatten(dim, dim + 1)


@rearrange_tokens.register_fake
def _(
    x: torch.Tensor,
    dim: int,
    held: Sequence[int],
    wanted: Sequence[int],
    offset: int,
    fills: bool,
    layout: str,
    world_size: int,
    group: str,
    wanted_layout: str = "",
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    shape = list(x.shape)
    slots = slots_of(wanted, wanted_layout or layout, world_size)
    shape[dim] = shape[dim] // slots_of(held, layout, world_size) * slots
    return x.new_empty(shape)


def _keep_settings(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.settings = inputs[1:]


def _rearrange_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dim, held, wanted, offset, _, layout, world_size, group, wanted_layout, bounds = ctx.settings
    axis = wanted_layout or layout, world_size, group, layout, bounds
    return rearrange_tokens(grad, dim, wanted, held, -offset, False, *axis), *(None,) * 10


rearrange_tokens.register_autograd(_rearrange_backward, setup_context=_keep_settings)


@torch.library.custom_op("cpcompile::arranged_positions", mutates_args=())
def arranged_positions(like: torch.Tensor, arrangement: Sequence[int], layout: str, world_size: int) -> torch.Tensor:
    """Return the positions of the slots of all ranks, laid end to end, int64 `[P * slots]` on the device of `like`.

    That of padding is -1.
    """
    arranged = Arrangement.of(arrangement, world_size, layout)
    return torch.cat([arranged.positions(rank) for rank in range(world_size)]).to(like.device)


@arranged_positions.register_fake
def _(like: torch.Tensor, arrangement: Sequence[int], layout: str, world_size: int) -> torch.Tensor:
    return like.new_empty(slots_of(arrangement, layout, world_size) * world_size, dtype=torch.int64)
