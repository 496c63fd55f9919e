"""Dropout: what is dropped is a function of a seed, the site and an element's place in the whole tensor, never of the rank.

The random numbers are SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014) with
Stafford's Mix13 as its finaliser: number i of a stream is a bijection of `key + (i + 1) * gamma`, so that any rank
computes the numbers of its own elements. Number `site` of the stream of the shared seed is the key of that site.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.record import collective
from cpcompile.runtime.tokens.shard import factors
from cpcompile.runtime.transport import process_group

Tensor = torch.Tensor
SEEDED = (torch.Tag.nondeterministic_seeded,)

# Elements whose random numbers exist at once: two int64 each, within a core's cache, or a part of a GPU's memory
# that is large enough to hide the launches.
_CHUNK = {"cpu": 1 << 15}
_CHUNK_OF_OTHERS = 1 << 22


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def splitmix64(key: Tensor, index: Tensor) -> Tensor:
    """Return number `index` of the stream that `key` begins, int64 with all bits used; overwrites `index`."""
    z = index.add_(1).mul_(_GAMMA).add_(key)
    for shift, factor in _ROUNDS:
        z.bitwise_xor_(_shifted(z, shift)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, shift: int) -> Tensor:
    """Return `z >> shift` with zeros shifted in: that of torch keeps the sign."""
    return (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def is_kept(seed: Tensor, site: int, index: Tensor, p: float) -> Tensor:
    """Return for each element, given by its place in the whole tensor, whether it is kept; overwrites `index`."""
    key = splitmix64(seed, torch.full_like(seed, site))
    return splitmix64(key, index) >= int(p * 2.0**64) - (1 << 63)


@collective("cpcompile::shared_seed", tags=SEEDED)
def shared_seed(device: torch.device, world_size: int, group: str) -> Tensor:
    """Return a random int64 scalar that all ranks share: the first rank's, though each draws one from its own generator."""
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), device=device)
    return process_group.broadcast(seed, world_size, group)


@shared_seed.register_fake
def _(device: torch.device, world_size: int, group: str) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device)


@torch.library.custom_op("cpcompile::dropout_tokens", mutates_args=())
def dropout_tokens(
    x: Tensor,
    seed: Tensor,
    site: int,
    p: float,
    dim: int,
    inner: int,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    bounds: Tensor | None = None,
) -> Tensor:
    """Return `x` with the elements that the seed drops set to 0 and the others scaled by `1 / (1 - p)`.

    Args:
        x: this rank's tokens, or a whole tensor if `dim` is -1. Padding slots get arbitrary values.
        seed: int64 scalar, the same on all ranks.
        site: number of the dropout in the graph.
        p: probability of being dropped, below 1.
        dim, inner: where the tokens are.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    chunks = chunks_of_elements(x, dim, inner, length, layout, world_size, group, bounds)
    for rows, index in chunks:
        width = index.shape[1]
        kept = is_kept(seed, site, index, p)
        torch.mul(x.reshape(-1, width)[rows], 1 / (1 - p), out=out.view(-1, width)[rows]).mul_(kept)
    return out


def chunks_of_elements(
    x: Tensor, dim: int, inner: int, length: int, layout: str, world_size: int, group: str, bounds: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the elements of `x` as rows, and the place of each in the whole tensor `[rows, width]`."""
    whole = dim < 0
    width = inner * x.shape[dim + 1 :].numel() if not whole else x.shape[-1] if x.dim() else 1
    if not x.numel():
        return
    num_rows, columns = x.numel() // width, torch.arange(width, device=x.device)
    order = TokenOrder.of(length, world_size, layout, bounds)
    position = None if whole else order.positions(process_group.rank_in(world_size, group), x.device)
    step = max(_CHUNK.get(x.device.type, _CHUNK_OF_OTHERS) // width, 1)
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        row = torch.arange(begin, end, device=x.device)
        if position is not None:
            row = (row // len(position)).mul_(length).add_(position[row % len(position)])
        yield slice(begin, end), row.mul_(width)[:, None] + columns


@dropout_tokens.register_fake
def _(x: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_seed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.settings = inputs[2:]


def _dropout_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return dropout_tokens(grad, seed, *ctx.settings), *(None,) * 10


dropout_tokens.register_autograd(_dropout_backward, setup_context=_keep_seed)


@torch.library.custom_op("cpcompile::draw_kept", mutates_args=(), tags=SEEDED)
def draw_kept(
    x: Tensor,
    after: Tensor | None,
    of_features: bool,
    p: float,
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
    """Return which elements torch's own dropout of the whole tensor keeps, bool: this rank's tokens, or all if `dim` is -1.

    Draws what one device draws from the default generator, which moves on as far.

    Args:
        x: this rank's tokens; only shape, dtype and device are read.
        after: what the previous draw returned: draws cannot be reordered then.
        of_features: draw one number for each index of the first two dims; the others have size 1.
        p: probability of being dropped, between 0 and 1.
        order: the dims of the whole tensor in the order of its memory, largest stride first.
        dim, inner, front, back: the placement of `x`.
    """
    shape = _drawn_shape(x, of_features)
    if dim >= 0:
        shape[dim] = shape[dim] // local_length(length, world_size, layout) * (length - front - back)
    ones = torch.ones([shape[d] for d in order], dtype=x.dtype, device=x.device)
    ones = ones.permute([list(order).index(d) for d in range(x.dim())])
    kept = (torch.feature_dropout if of_features else torch.dropout)(ones, p, True) != 0
    return own_tokens(kept, dim, inner, front, back, length, TokenOrder.of(length, world_size, layout, bounds), group)


def own_tokens(
    whole: Tensor, dim: int, inner: int, front: int, back: int, length: int, order: TokenOrder, group: str
) -> Tensor:
    """Return this rank's tokens of what was drawn whole, or all if `dim` is -1; 0 outside the range."""
    if dim < 0:
        return whole.contiguous()
    whole = factors(whole, dim, inner, length - front - back)
    if front or back:
        pads = [0, 0] * (whole.dim() - dim - 2) + [front, back]
        whole = torch.nn.functional.pad(whole, pads)
    index = order.sources(process_group.rank_in(order.world_size, group), whole.device)
    return whole.index_select(dim + 1, index).flatten(dim, dim + 2).contiguous()


def _drawn_shape(x: Tensor, of_features: bool) -> list[int]:
    """Return the shape of the random numbers for `x`."""
    return [size if d < 2 or not of_features else 1 for d, size in enumerate(x.shape)]


@draw_kept.register_fake
def _(x: Tensor, after: Tensor | None, of_features: bool, *settings: Any) -> Tensor:
    return x.new_empty(_drawn_shape(x, of_features), dtype=torch.bool)
