"""Tokens: what the operators that shard, gather, shift, pick and reduce tokens promise."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.layout import chunk_length, num_chunks, positions
from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions.slices import Calls, Ranks, factors, join, split
from cpcompile.ir.placement import Sharded


def shard(calls: Calls) -> Ranks:
    return [split(c["x"], Sharded(c["dim"], c["inner"]), TokenOrder.of_call(c))[rank] for rank, c in enumerate(calls)]


def gather(calls: Calls) -> Ranks:
    c = calls[0]
    return [join([c["x"] for c in calls], Sharded(c["dim"], c["inner"]), TokenOrder.of_call(c))] * len(calls)


def fill(calls: Calls) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        x, dim, inner = c["x"], c["dim"], c["inner"]
        position = TokenOrder.of_call(c).positions(rank, x.device)
        padding = (position < c["front"]) | (position >= c["length"] - c["back"])
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        outer = x.shape[dim] // (len(padding) * inner)
        results.append(x.masked_fill(padding.repeat_interleave(inner).repeat(outer).view(shape), c["value"]))
    return results


def all_reduce(calls: Calls) -> Ranks:
    return [sum((c["x"] for c in calls[1:]), calls[0]["x"])] * len(calls)


def scale(calls: Calls) -> Ranks:
    return [_Scale.apply(c["x"], c["scale"]) for c in calls]  # type: ignore[no-untyped-call]


def show(calls: Calls) -> Ranks:
    return [c["x"] for c in calls]


class _Scale(torch.autograd.Function):
    """Identity, with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None


def _padded(order: TokenOrder) -> int:
    """Return the tokens of all ranks, padding included."""
    return order.world_size * order.local_length


def _slots(whole: torch.Tensor, at: Sharded, order: TokenOrder) -> list[torch.Tensor]:
    """Return what each rank holds of a tensor that has a value for padding slots too."""
    whole = factors(whole, at, _padded(order))
    held = (order.positions(rank, whole.device) for rank in range(order.world_size))
    return [whole.index_select(at.dim + 1, index).flatten(at.dim, at.dim + 2) for index in held]


def move(calls: Calls) -> Ranks:
    c = calls[0]
    at, length, order = Sharded(c["dim"], c["inner"]), c["length"], TokenOrder.of_call(c)
    whole = factors(join([c["x"] for c in calls], at, order), at, length)
    target = torch.arange(_padded(order), device=whole.device)
    source = c["sign"] * target + c["offset"]
    if c["wrap"]:
        source = source % length
    outside = (source < 0) | (source >= length) | (target >= length)
    moved = whole.index_select(at.dim + 1, source.clamp(0, length - 1))
    moved = moved.masked_fill(outside.view(-1, *[1] * (whole.dim() - at.dim - 2)), c["fill"])
    return _slots(moved.flatten(at.dim, at.dim + 2), at, order)


def rearrange(calls: Calls) -> Ranks:
    c = calls[0]
    bounds = c.get("bounds")
    held = Arrangement.of(c["held"], len(calls), c["layout"], bounds)
    wanted = Arrangement.of(c["wanted"], len(calls), c.get("wanted_layout") or c["layout"], bounds)
    at = Sharded(c["dim"])
    whole = factors(join([c["x"] for c in calls], at, held), at, held.length)
    results = []
    for rank in range(len(calls)):
        source = wanted.sources(rank).to(whole.device) + c["offset"]
        shape = [-1, *[1] * (whole.dim() - at.dim - 2)]
        is_there = ((source >= 0) & (source < held.length)).view(shape)
        is_padding = (wanted.positions(rank) < 0).to(whole.device).view(shape)
        found = whole.index_select(at.dim + 1, source.clamp(0, held.length - 1)) * is_there
        # What padding slots hold counts for nothing.
        results.append(torch.where(is_padding, found.detach() * c["fills"], found).flatten(at.dim, at.dim + 2))
    return results


def arranged_positions(calls: Calls) -> Ranks:
    c = calls[0]
    arrangement = Arrangement.of(c["arrangement"], len(calls), c["layout"])
    return [torch.cat([arrangement.positions(rank) for rank in range(len(calls))]).to(c["like"].device)] * len(calls)


def halo(calls: Calls) -> Ranks:
    c = calls[0]
    at, length, layout, world_size = Sharded(c["dim"]), c["length"], c["layout"], c["world_size"]
    order = TokenOrder.of(length, world_size, layout)
    whole = factors(join([c["x"] for c in calls], at, order), at, length)

    def zeros(count: int) -> torch.Tensor:
        return whole.new_zeros(*whole.shape[: at.dim + 1], count, *whole.shape[at.dim + 2 :])

    wide = torch.cat([zeros(c["before"]), whole, zeros(_padded(order) - length + c["after"])], at.dim + 1)
    results = []
    for rank in range(world_size):
        size = chunk_length(length, world_size, layout)
        starts = positions(length, rank, world_size, layout)[::size].tolist()
        chunks = [wide.narrow(at.dim + 1, start, c["before"] + size + c["after"]) for start in starts]
        results.append(torch.cat(chunks, at.dim + 1).flatten(at.dim, at.dim + 2))
    return results


def exchange_dims(calls: Calls) -> Ranks:
    c = calls[0]
    whole = join([c["x"] for c in calls], Sharded(c["dim"]), TokenOrder.of_call(c))
    return split(
        whole, Sharded(c["to"]), TokenOrder.of(c["to_length"], c["world_size"], c["layout"], c.get("to_bounds"))
    )


def pick(calls: Calls) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        at = Sharded(c["dim"])
        alone = [c["x"] if other == rank else torch.zeros_like(c["x"]) for other in range(len(calls))]
        whole = factors(join(alone, at, TokenOrder.of_call(c)), at, c["length"])
        results.append(whole.narrow(at.dim + 1, c["start"], c["count"]).flatten(at.dim, at.dim + 2))
    return results


def put(calls: Calls) -> Ranks:
    results = []
    order = TokenOrder.of_call(calls[0])
    padded = _padded(order)
    for rank, c in enumerate(calls):
        at, start = Sharded(c["dim"]), c["start"]
        parts = torch.cat([factors(c["x"], at, order.local_length) for c in calls], at.dim + 1)
        held = torch.cat([order.positions(r, parts.device) for r in range(len(calls))])
        whole = parts.index_select(at.dim + 1, held.argsort())
        count = c["values"].shape[at.dim] // whole.shape[at.dim]
        front = whole.narrow(at.dim + 1, 0, start)
        back = whole.narrow(at.dim + 1, start + count, padded - start - count)
        put = torch.cat([front, factors(c["values"], at, count), back], at.dim + 1).flatten(at.dim, at.dim + 2)
        results.append(_slots(put, at, order)[rank])
    return results


def local_slots(calls: Calls) -> Ranks:
    results = []
    order = TokenOrder.of_call(calls[0])
    for rank, c in enumerate(calls):
        held = order.positions(rank, c["index"].device)
        slots = held.new_full((_padded(order),), -1)
        slots[held] = torch.arange(len(held), device=held.device)
        results.append(slots[: c["length"]][c["index"]])
    return results


def rank_positions(calls: Calls) -> Ranks:
    return [TokenOrder.of_call(c).positions(rank, c["like"].device) for rank, c in enumerate(calls)]


def chunk_indices(calls: Calls) -> Ranks:
    """With one token a chunk, a chunk's number is its token's position."""
    c = calls[0]
    length = num_chunks(c["world_size"], c["layout"])
    return [positions(length, rank, c["world_size"], c["layout"], c["like"].device) for rank in range(len(calls))]


def stack_ranks(calls: Calls) -> Ranks:
    return [torch.stack([c["x"] for c in calls])] * len(calls)
