"""Lockstep: all ranks of a transformed graph in one process, node by node, with plain autograd.

Collectives are ordinary differentiable code over the ranks' values and share nothing with the runtime, so
that this checks the rewrite. A value that is the same on every rank by construction is computed once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operators)
from cpcompile.layout import inverse, local_length, positions
from cpcompile.placement import Full, Partial, Placement, Sharded

cp = torch.ops.cpcompile
Ranks = list[Any]


def factors(x: torch.Tensor, at: Sharded, tokens: int) -> torch.Tensor:
    """Return `x` with the dim of the tokens viewed as (outer, tokens, inner)."""
    sizes = (x.shape[at.dim] // (tokens * at.inner), tokens, at.inner)
    return x.reshape(*x.shape[: at.dim], *sizes, *x.shape[at.dim + 1 :])


def join(values: Sequence[torch.Tensor], at: Sharded, length: int, layout: str) -> torch.Tensor:
    """Return the whole tensor, in the user's order, of the ranks' tokens."""
    world_size = len(values)
    slots = local_length(length, world_size, layout)
    parts = [factors(v, at, slots) for v in values]
    order = inverse(length, world_size, layout, values[0].device)[at.front : length - at.back]
    return torch.cat(parts, at.dim + 1).index_select(at.dim + 1, order).flatten(at.dim, at.dim + 2)


def split(whole: torch.Tensor, at: Sharded, length: int, layout: str, world_size: int) -> list[torch.Tensor]:
    """Return each rank's tokens of a whole tensor; padding slots repeat the last token."""
    whole = factors(whole, at, length)
    parts = []
    for rank in range(world_size):
        index = positions(length, rank, world_size, layout, whole.device).clamp(max=length - 1)
        parts.append(whole.index_select(at.dim + 1, index).flatten(at.dim, at.dim + 2))
    return parts


def _shard(calls: list[Mapping[str, Any]]) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        at = Sharded(c["dim"], c["inner"])
        results.append(split(c["x"], at, c["length"], c["layout"], c["world_size"])[rank])
    return results


def _gather(calls: list[Mapping[str, Any]]) -> Ranks:
    c = calls[0]
    return [join([c["x"] for c in calls], Sharded(c["dim"], c["inner"]), c["length"], c["layout"])] * len(calls)


def _fill(calls: list[Mapping[str, Any]]) -> Ranks:
    results = []
    for rank, c in enumerate(calls):
        x, dim, inner = c["x"], c["dim"], c["inner"]
        position = positions(c["length"], rank, c["world_size"], c["layout"], x.device)
        padding = (position < c["front"]) | (position >= c["length"] - c["back"])
        shape = [1] * x.dim()
        shape[dim] = x.shape[dim]
        outer = x.shape[dim] // (len(padding) * inner)
        results.append(x.masked_fill(padding.repeat_interleave(inner).repeat(outer).view(shape), c["value"]))
    return results


def _all_reduce(calls: list[Mapping[str, Any]]) -> Ranks:
    return [sum((c["x"] for c in calls[1:]), calls[0]["x"])] * len(calls)


def _scale(calls: list[Mapping[str, Any]]) -> Ranks:
    return [_Scale.apply(c["x"], c["scale"]) for c in calls]  # type: ignore[no-untyped-call]


class _Scale(torch.autograd.Function):
    """Identity, with a scaled gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.scale, None


def _attention(calls: list[Mapping[str, Any]]) -> Ranks:
    c = calls[0]
    length, layout, at = c["length"], c["layout"], Sharded(2)
    q, k, v = (join([c[name] for c in calls], at, length, layout) for name in "qkv")
    mask = c["mask"]
    if mask is not None and mask.shape[-2] != 1 and "ulysses" not in c["target"]:  # the others hold their query rows
        mask = join([c["mask"] for c in calls], Sharded(mask.dim() - 2), length, layout)
    out = reference_attention(q, k, v, mask, c)
    return [(part, None) for part in split(out, at, length, layout, len(calls))]


def reference_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, c: Mapping[str, Any]
) -> torch.Tensor:
    """Return attention as its definition says, whole, `[B, H, S, D]`; rows that see no key are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * c["scale"]
    if c["softcap"]:
        scores = c["softcap"] * torch.tanh(scores / c["softcap"])
    row = torch.arange(q.shape[2], device=q.device)[:, None]
    column = torch.arange(k.shape[2], device=q.device)[None, :]
    seen = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if c["is_causal"]:
        seen = seen & (column <= row)
    if c["window"]:
        seen = seen & (row - column < c["window"])
    if c["documents"] is not None:
        seen = seen & (c["documents"][:, None, :, None] == c["documents"][:, None, None, :])
    if c["key_padding"] is not None:
        seen = seen & c["key_padding"][:, None, None, :]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    blind = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~seen & ~blind, float("-inf")).softmax(-1).masked_fill(blind, 0.0)
    out: torch.Tensor = weights.to(v.dtype) @ v
    return out


COLLECTIVES: dict[Any, Callable[[list[Mapping[str, Any]]], Ranks]] = {
    cp.shard_tokens.default: _shard,
    cp.gather_tokens.default: _gather,
    cp.fill_padding.default: _fill,
    cp.all_reduce.default: _all_reduce,
    cp.scale_gradient.default: _scale,
    cp.ring_attention.default: _attention,
    cp.gather_attention.default: _attention,
    cp.ulysses_attention.default: _attention,
}


class Lockstep:
    """Runs a transformed graph for all its ranks."""

    def __init__(self, gm: fx.GraphModule, world_size: int) -> None:
        self.gm, self.world_size = gm, world_size

    def run(self, *inputs: Any) -> list[Any]:
        """Return the outputs of each rank, given the inputs that every rank has."""
        outputs: list[Any] = []
        for node, values in self.steps(*inputs):
            if node.op == "output":
                outputs = values
        return outputs

    def steps(self, *inputs: Any) -> Iterator[tuple[fx.Node, Ranks]]:
        """Yield every node with its value on each rank. Values are dropped after their last use."""
        given = iter(inputs)
        values: dict[fx.Node, Ranks] = {}
        last_use = {operand: node for node in self.gm.graph.nodes for operand in node.all_input_nodes}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = [next(given)] * self.world_size
            elif node.op == "get_attr":
                values[node] = [operator.attrgetter(node.target)(self.gm)] * self.world_size
            else:
                values[node] = self._step(node, values)
            yield node, values[node]
            for operand in node.all_input_nodes:
                if last_use[operand] is node:
                    del values[operand]

    def _step(self, node: fx.Node, values: Mapping[fx.Node, Ranks]) -> Ranks:
        def of_rank(rank: int) -> tuple[Any, Any]:
            return fx.map_arg((node.args, node.kwargs), lambda operand: values[operand][rank])

        if node.op == "output":
            return [of_rank(rank)[0][0] for rank in range(self.world_size)]
        if node.target in COLLECTIVES:
            calls: list[Mapping[str, Any]] = []
            for rank in range(self.world_size):
                args, kwargs = of_rank(rank)
                names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
                calls.append({**dict(zip(names, args, strict=False)), **kwargs, "target": str(node.target)})
            return COLLECTIVES[node.target](calls)
        if self._is_shared(node, values):
            args, kwargs = of_rank(0)
            return [node.target(*args, **kwargs)] * self.world_size  # type: ignore[operator]
        return [node.target(*args, **kwargs) for args, kwargs in map(of_rank, range(self.world_size))]  # type: ignore[operator]

    def _is_shared(self, node: fx.Node, values: Mapping[fx.Node, Ranks]) -> bool:
        """Tell whether every rank has the very same operands; then one run serves all."""
        return all(value is values[operand][0] for operand in node.all_input_nodes for value in values[operand])


def whole_value(values: Ranks, placement: Placement, length: int, layout: str) -> Any:
    """Return the value that the ranks hold together."""
    match placement:
        case Sharded():
            return join(values, placement, length, layout)
        case Partial():
            return sum(values[1:], values[0])
        case Full():
            return values[0]
