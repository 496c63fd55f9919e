"""Noise: random numbers by a seed, the site and an element's place in the whole tensor, or those that one device draws.

As for `dropout`: number i of a stream is computed by whichever rank holds element i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.tokens.dropout import SEEDED, chunks_of_elements, own_tokens, splitmix64

Tensor = torch.Tensor
_BITS = 53  # of a float64 below 1


def noise_at(seed: Tensor, site: int, index: Tensor, kind: str, a: float, b: float) -> Tensor:
    """Return float64 numbers for elements, by their places in the whole tensor.

    Args:
        kind: `uniform` in [a, b), `normal` of mean a and deviation b (Box and Muller: A note on the generation of random normal
            deviates, 1958), or `bernoulli`: 1 with probability a.
    """
    key = splitmix64(seed, torch.full_like(seed, site))
    first = _unit(splitmix64(key, 2 * index))
    if kind == "uniform":
        return first.mul_(b - a).add_(a)
    if kind == "bernoulli":
        return (first < a).double()
    second = _unit(splitmix64(key, 2 * index + 1))
    return (-2 * torch.log1p(-first)).sqrt_().mul_(second.mul_(2 * math.pi).cos_()).mul_(b).add_(a)


def _unit(bits: Tensor) -> Tensor:
    """Return numbers in [0, 1) of the upper bits of int64 numbers."""
    return ((bits >> (64 - _BITS)) & ((1 << _BITS) - 1)).double().mul_(2.0**-_BITS)


@torch.library.custom_op("cpcompile::noise_tokens", mutates_args=())
def noise_tokens(
    x: Tensor,
    seed: Tensor,
    site: int,
    kind: str,
    a: float,
    b: float,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
) -> Tensor:
    """Return random numbers for this rank's tokens, the same on any number of ranks.

    Args:
        x: this rank's tokens; only shape, dtype and device are read. Padding slots get arbitrary values.
        seed: int64 scalar, the same on all ranks.
        site: number of the place in the graph.
        kind, a, b: see `noise_at`.
        dim, inner: where the tokens are.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for rows, index in chunks_of_elements(x, dim, inner, length, layout, world_size, group, bounds):
        out.view(-1, index.shape[1])[rows] = noise_at(seed, site, index, kind, a, b).to(x.dtype)
    return out


@torch.library.custom_op("cpcompile::draw_noise", mutates_args=(), tags=SEEDED)
def draw_noise(
    x: Tensor,
    after: Tensor | None,
    kind: str,
    a: float,
    b: float,
    order: Sequence[int],
    dim: int,
    inner: int,
    front: int,
    back: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
) -> Tensor:
    """Return what torch draws for the whole tensor from the default generator: this rank's tokens, or all if `dim` is -1.

    Args:
        x: this rank's tokens; only shape, dtype and device are read.
        after: what the previous draw returned: draws cannot be reordered then.
        kind, a, b: see `noise_at`.
        order: the dims of the whole tensor in the order of its memory, largest stride first.
        dim, inner, front, back: the placement of `x`.
    """
    shape = list(x.shape)
    if dim >= 0:
        shape[dim] = shape[dim] // local_length(length, world_size, layout) * (length - front - back)
    whole = torch.empty([shape[d] for d in order], dtype=x.dtype, device=x.device)
    whole = drawn(whole.permute([list(order).index(d) for d in range(x.dim())]), kind, a, b)
    return own_tokens(whole, dim, inner, front, back, length, TokenOrder.of(length, world_size, layout, bounds), group)


def drawn(x: Tensor, kind: str, a: float, b: float) -> Tensor:
    """Fill `x` as torch does."""
    if kind == "bernoulli":
        return x.bernoulli_(a)
    return x.uniform_(a, b) if kind == "uniform" else x.normal_(a, b)


def _like(x: Tensor, *settings: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


noise_tokens.register_fake(_like)
draw_noise.register_fake(_like)
