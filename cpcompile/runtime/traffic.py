"""Traffic: how many bytes each rank sends for one call of a collective operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.attention import strategies  # noqa: F401  (registers the operators)
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.workload import Workload, attention_bytes, workload_of
from cpcompile.runtime.tokens.exchange import halo_spans, route_of
from cpcompile.runtime.tokens.moves import Route, Spans, most_sent

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
    defaults = {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}
    return count(defaults | dict(arguments))


def sends(target: Any) -> bool:
    """Tell whether an operator communicates."""
    return target._schema.name.removeprefix("cpcompile::") in _COUNTS


def _bytes(x: torch.Tensor) -> int:
    return int(x.numel()) * x.dtype.itemsize


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
    order = TokenOrder.of(a["length"], a["world_size"], a["layout"])
    token = _bytes(a["x"]) // order.local_length
    sent, received = most_sent(order.spans, targets, route)
    return Traffic(token * sent, token * received if a["x"].is_floating_point() else 0)


def _move_tokens(a: Arguments) -> Traffic:
    targets = TokenOrder.of(a["length"], a["world_size"], a["layout"]).spans
    return _exchange(a, targets, route_of(a["sign"], a["offset"], a["wrap"], a["length"]))


def _rearrange_tokens(a: Arguments) -> Traffic:
    source = Arrangement.of(a["held"], a["world_size"], a["layout"])  # where documents begin is not read
    target = Arrangement.of(a["wanted"], a["world_size"], a.get("wanted_layout") or a["layout"])
    element = _bytes(a["x"]) // source.local_length
    route = Route(1, (a["offset"],))
    forward = most_sent(source.spans, target.spans_with_padding if a["fills"] else target.spans, route)
    backward = most_sent(source.spans, target.spans, route)
    return Traffic(element * forward[0], element * backward[1] if a["x"].is_floating_point() else 0)


def _halo_tokens(a: Arguments) -> Traffic:
    world_size, layout = a["world_size"], a["layout"]
    targets = [halo_spans(a["before"], a["after"], a["length"], rank, world_size, layout) for rank in range(world_size)]
    return _exchange(a, targets, Route())


def _exchange_dims(a: Arguments) -> Traffic:
    target = TokenOrder.of(a["to_length"], a["world_size"], a["layout"])
    size = (a["world_size"] - 1) * _bytes(a["x"]) // a["to_length"] * target.local_length
    return Traffic(size, size if a["x"].is_floating_point() or a["x"].is_complex() else 0)


def _attention(strategy: str) -> Callable[[Arguments], Traffic]:
    return lambda a: Traffic(*attention_bytes(attention_workload(a), strategy))


def _latent_heads(a: Arguments) -> Traffic:
    workload = attention_workload(a)
    return Traffic(*attention_bytes(replace(workload, kv_heads=workload.kv_heads * a["world_size"]), "latent_heads"))


def attention_workload(a: Arguments) -> Workload:
    """Return an attention operator's arguments as a workload. Where documents begin is not read: they hide nothing here."""
    given = [None if name == "bounds" else a[name] for name in TERMS]
    visible = AttentionArguments.of(a["q"], a["k"], given, a["length"]).visible
    names = "length", "layout", "world_size", "inner_size", "keeps_heads", "heads_per_message"
    return workload_of(a["q"], a["k"], a["v"], visible=visible, **{name: a[name] for name in names if name in a})


# The arguments behind q, k and v, in the order of `AttentionArguments`.
TERMS = [a.name for a in torch.ops.cpcompile.ring_attention.default._schema.arguments[3:] if not a.kwarg_only]
_COUNTS: dict[str, Callable[[Arguments], Traffic]] = {
    "all_reduce": _all_reduce,
    "gather_tokens": _gather_tokens,
    "move_tokens": _move_tokens,
    "rearrange_tokens": _rearrange_tokens,
    "halo_tokens": _halo_tokens,
    "exchange_dims": _exchange_dims,
    "stack_ranks": _stack_ranks,
    "latent_heads_attention": _latent_heads,
    "shared_seed": lambda a: Traffic(torch.int64.itemsize, 0),
    **{f"{name}_attention": _attention(name) for name, known in STRATEGIES.items() if not known.is_latent},
}
