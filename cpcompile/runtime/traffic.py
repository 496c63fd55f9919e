"""Traffic: how many bytes each rank sends for one call of a collective operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.layout import local_length
from cpcompile.runtime.exchange import halo_spans, route_of, spans_of_ranks
from cpcompile.runtime.heads import heads_of
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.moves import Route, Spans, most_sent

Arguments = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that the busiest rank sends, in the forward and in the backward of one call."""

    forward: int
    backward: int


def traffic(target: torch._ops.OpOverload, arguments: Arguments) -> Traffic:
    """Return the traffic of calling `target` with arguments by schema name; tensors may be fake, sizes must be known."""
    count = _COUNTS.get(target._schema.name.removeprefix("cpcompile::"))
    if count is None or arguments["world_size"] == 1:
        return Traffic(0, 0)
    return count(arguments)


def sends(target: Any) -> bool:
    """Tell whether an operator communicates."""
    return target._schema.name.removeprefix("cpcompile::") in _COUNTS


def _bytes(x: torch.Tensor, dtype: torch.dtype | None = None) -> int:
    return int(x.numel()) * (dtype or x.dtype).itemsize


def _gather_tokens(a: Arguments) -> Traffic:
    others = a["world_size"] - 1
    return Traffic(others * _bytes(a["x"]), others * _bytes(a["x"]))


def _all_reduce(a: Arguments) -> Traffic:
    # A ring all-reduce is a reduce-scatter and an all-gather of 1/P each.
    size = 2 * _bytes(a["x"]) * (a["world_size"] - 1) // a["world_size"]
    return Traffic(size, size if a["x"].dtype.is_floating_point else 0)


def _stack_ranks(a: Arguments) -> Traffic:
    size = (a["world_size"] - 1) * _bytes(a["x"])
    return Traffic(size, size if a["x"].is_floating_point() else 0)


def _exchange(a: Arguments, targets: Sequence[Spans], route: Route) -> Traffic:
    axis = a["length"], a["world_size"], a["layout"]
    token = _bytes(a["x"]) // local_length(*axis)
    sent, received = most_sent(spans_of_ranks(*axis), targets, route)
    return Traffic(token * sent, token * received if a["x"].is_floating_point() else 0)


def _move_tokens(a: Arguments) -> Traffic:
    targets = spans_of_ranks(a["length"], a["world_size"], a["layout"])
    return _exchange(a, targets, route_of(a["sign"], a["offset"], a["wrap"], a["length"]))


def _halo_tokens(a: Arguments) -> Traffic:
    world_size, layout = a["world_size"], a["layout"]
    targets = [halo_spans(a["before"], a["after"], a["length"], rank, world_size, layout) for rank in range(world_size)]
    return _exchange(a, targets, Route())


def _keys(a: Arguments, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of one rank's keys and values."""
    return _bytes(a["k"], dtype) + _bytes(a["v"], dtype)


def _ring(a: Arguments) -> Traffic:
    steps, gradients = a["world_size"], _keys(a, accumulation_dtype(a["k"].dtype))
    return Traffic((steps - 1) * _keys(a), (steps - 1) * _keys(a) + steps * gradients)


def _gather(a: Arguments) -> Traffic:
    others, gradients = a["world_size"] - 1, _keys(a, accumulation_dtype(a["k"].dtype))
    return Traffic(others * _keys(a), others * (_keys(a) + gradients))


def _ulysses(a: Arguments) -> Traffic:
    size, slots = a["world_size"], local_length(a["length"], a["world_size"], a["layout"])
    q, k, v = a["q"], a["k"], a["v"]
    ranks = [heads_of(rank, size, q.shape[1], k.shape[1]) for rank in range(size)]
    token = int(q.shape[0]) * slots * q.dtype.itemsize
    dim, value_dim = int(q.shape[3]), int(v.shape[3])
    inward = [token * (r.num_query * dim + r.num_key * (dim + value_dim)) for r in ranks]
    outward = [token * r.num_query * value_dim for r in ranks]
    # A rank sends tokens of the others' heads one way, and the others' tokens of its own heads the other way.
    forward = max(sum(inward) - inward[r] + (size - 1) * outward[r] for r in range(size))
    backward = max(sum(outward) - outward[r] + (size - 1) * inward[r] for r in range(size))
    return Traffic(forward, backward)


_COUNTS: dict[str, Callable[[Arguments], Traffic]] = {
    "all_reduce": _all_reduce,
    "gather_tokens": _gather_tokens,
    "move_tokens": _move_tokens,
    "halo_tokens": _halo_tokens,
    "stack_ranks": _stack_ranks,
    "shared_seed": lambda a: Traffic(torch.int64.itemsize, 0),
    "ring_attention": _ring,
    "gather_attention": _gather,
    "ulysses_attention": _ulysses,
}
