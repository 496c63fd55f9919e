"""Lockstep: all ranks of a transformed graph in one process, node by node, with plain autograd.

Collectives are those of `definitions`, so that this checks the rewrite. A value that is the same on every rank by
construction is computed once. What ranks do not share, they do not share here: each has its own copy of what the graph
writes (buffers, inputs), and a random generator in the state that all have.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.capture.writes.aliases import hidden_writes, written_arguments
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.slices import Calls, Ranks, join
from cpcompile.ir.placement import Full, Partial, Placement, Sharded
from cpcompile.runtime.own_backward import backward_body_of


class Lockstep:
    """Runs a transformed graph for all its ranks."""

    def __init__(self, gm: fx.GraphModule, world_size: int) -> None:
        self.gm, self.world_size = gm, world_size
        self.bounds: dict[fx.Node, torch.Tensor] = {}  # where documents begin, as far as the graph has run
        self.written: dict[
            fx.Node, Ranks
        ] = {}  # inputs that the graph writes: that of the first rank, copies of the others

    def run(self, *inputs: Any) -> list[Any]:
        """Return the outputs of each rank, given the inputs that every rank has."""
        return self.run_ranks(*([value] * self.world_size for value in inputs))

    def run_ranks(self, *inputs: Ranks) -> list[Any]:
        """Return the outputs of each rank, given what each has of every input."""
        outputs: list[Any] = []
        for node, values in self._steps(*inputs):
            if node.op == "output":
                outputs = values
        return outputs

    def steps(self, *inputs: Any) -> Iterator[tuple[fx.Node, Ranks]]:
        """Yield every node with its value on each rank. Values are dropped after their last use."""
        return self._steps(*([value] * self.world_size for value in inputs))

    def _steps(self, *inputs: Ranks) -> Iterator[tuple[fx.Node, Ranks]]:
        given = iter(inputs)
        values: dict[fx.Node, Ranks] = {}
        written = written_inputs(self.gm)
        last_use = {operand: node for node in self.gm.graph.nodes for operand in node.all_input_nodes}
        for node in self.gm.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                if node in written:
                    values[node][1:] = [values[node][0].clone() for _ in range(1, self.world_size)]
                    self.written[node] = list(values[node])
            elif node.op == "get_attr":
                values[node] = [operator.attrgetter(node.target)(self.gm)] * self.world_size
            else:
                values[node] = self._step(node, values)
            if node.target is torch.ops.cpcompile.document_bounds.default:
                self.bounds[node] = values[node][0]
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
            calls: Calls = []
            for rank in range(self.world_size):
                args, kwargs = of_rank(rank)
                schema = node.target._schema.arguments  # type: ignore[union-attr]
                defaults = {argument.name: argument.default_value for argument in schema if not argument.is_out}
                given = dict(zip(defaults, args, strict=False))
                calls.append({**defaults, **given, **kwargs, "target": str(node.target)})
            return COLLECTIVES[node.target](calls)
        if node.target is torch.ops.cpcompile.own_backward.default:
            return differentiate_by_own([of_rank(rank)[0] for rank in range(self.world_size)])
        if self._is_shared(node, values):
            args, kwargs = of_rank(0)
            return [node.target(*args, **kwargs)] * self.world_size  # type: ignore[operator]
        if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
            return self._draw(node, [of_rank(rank) for rank in range(self.world_size)])
        return [node.target(*args, **kwargs) for args, kwargs in map(of_rank, range(self.world_size))]  # type: ignore[operator]

    def _draw(self, node: fx.Node, arguments: Sequence[tuple[Any, Any]]) -> Ranks:
        """Let each rank draw from a generator in the same state, as ranks do; the first rank's goes on."""
        leaves = torch.utils._pytree.tree_leaves(arguments)
        devices = {x.device for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cuda"}
        results = []
        for rank in reversed(range(self.world_size)):
            args, kwargs = arguments[rank]
            with torch.random.fork_rng(devices=list(devices)) if rank else contextlib.nullcontext():
                results.append(node.target(*args, **kwargs))  # type: ignore[operator]
        return results[::-1]

    def _is_shared(self, node: fx.Node, values: Mapping[fx.Node, Ranks]) -> bool:
        """Tell whether every rank has the very same operands; then one run serves all."""
        return all(value is values[operand][0] for operand in node.all_input_nodes for value in values[operand])


def differentiate_by_own(calls: Sequence[tuple[Any, ...]]) -> Ranks:
    """Return the results of a function with a backward of its own, which all ranks then run in lockstep."""
    tensors = [(*results, *operands, *saved) for results, operands, saved, *_ in calls]
    flat = _OwnBackwards.apply(calls, *itertools.chain(*tensors))  # type: ignore[no-untyped-call]
    return by_rank(flat, len(calls))


def by_rank(values: Sequence[Any], num_ranks: int) -> Ranks:
    """Return the values of each rank, which stand behind one another."""
    count = len(values) // num_ranks
    return [list(values[rank * count : (rank + 1) * count]) for rank in range(num_ranks)]


class _OwnBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, calls: Sequence[tuple[Any, ...]], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.calls = calls
        return tuple(x.detach() for results, *_ in calls for x in results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [
            (*incoming, *(x.detach() for x in saved), *sizes)
            for incoming, (_, _, saved, sizes, _) in zip(by_rank(grads, len(ctx.calls)), ctx.calls, strict=True)
        ]
        body = backward_body_of(ctx.calls[0][-1])
        found = Lockstep(body, len(given)).run_ranks(*map(list, zip(*given, strict=True)))
        back: list[Any] = [None]
        for (results, _, saved, *_), gradients in zip(ctx.calls, found, strict=True):
            back += [*[None] * len(results), *gradients, *[None] * len(saved)]
        return tuple(back)


def written_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """Return the placeholders that operators of the graph write, running statistics included."""
    places = {x for node in gm.graph.nodes for x in (*written_arguments(node).values(), *hidden_writes(node))}
    return {node for node in gm.graph.find_nodes(op="placeholder") if node in places}


def whole_value(values: Ranks, placement: Placement, orders: Sequence[TokenOrder | Arrangement]) -> Any:
    """Return the value that the ranks hold together; `orders` of all sequences, which only a sharded value needs."""
    match placement:
        case Sharded():
            return join(values, placement, orders[placement.sequence])
        case Partial():
            return sum(values[1:], values[0])
        case Full():
            return values[0]
