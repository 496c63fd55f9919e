"""Planned step: a model traced and transformed for all ranks, without running it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.capture.dynamo import by_name, compile_whole, token_length, uncompiled
from cpcompile.capture.faults import faults_of
from cpcompile.capture.lowering import placeholders
from cpcompile.choose.machine import Machine
from cpcompile.compile.inner import transform_dynamo_graph
from cpcompile.compile.transform import Transformed
from cpcompile.errors import ConfigError
from cpcompile.inspect.backward import backward_listing
from cpcompile.inspect.explanation import Explanation
from cpcompile.inspect.graph_listing import input_name
from cpcompile.inspect.step_time import StepTime, step_time
from cpcompile.ir.operator_call import size_estimate, value_of
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.memory.fully_sharded import FullySharded, in_blocks, largest_block
from cpcompile.memory.ledger import REMEDY, Divided, Ledger, divided, ledger_of_halves
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis


class _Planned(Exception):
    """Ends the call of a model whose plan is made."""


def plan_for(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, world_size: int, config: Config, inner_size: int = 0
) -> Transformed:
    """Trace and transform `model` without running it."""
    return planned_step(model, inputs, world_size=world_size, config=config, inner_size=inner_size).transformed


@dataclass(frozen=True, slots=True)
class Planned:
    """A transformed graph, and what Dynamo called the compiler with."""

    transformed: Transformed
    inputs: tuple[Any, ...]
    shards: Mapping[int, ParameterShard]
    config: Config

    @faults_of("the graphs of forward and backward", REMEDY)
    def halves(self) -> Divided:
        """Return forward and backward as the inner compiler gets them. The graph is used up."""
        shards, outlines = self.sharded_blocks, self.config.outlines
        return divided(self.transformed, self.inputs, self.config, shards=shards, summed=self.summed, outlines=outlines)

    def ledger(self, halves: Divided, ddp: bool = False) -> Ledger:
        """Return what a training step holds on a rank; `ddp`: with buckets for all gradients."""
        shards = self.sharded_blocks
        return ledger_of_halves(
            halves,
            self.inputs,
            self.config,
            shards=shards,
            bytes_ahead=self.config.prefetch * largest_block(shards),
            buckets=sum(self.inputs[i].nbytes for i in self.trained) if ddp else 0,
        )

    @faults_of("the estimate of time", REMEDY)
    def step_time(self, halves: Divided, plan: Explanation, trained: int) -> StepTime | None:
        """Return what a training step takes; `trained`: bytes of the parameters of a rank that are trained."""
        exchanged = [
            (2 * c.calls, c.forward_bytes + c.backward_bytes)
            for c in plan.collectives
            if not c.operator.endswith("attention")
        ]
        assert plan.work is not None
        return step_time(
            halves,
            machine=plan.machine,
            ranks=plan.world_size,
            attention=plan.estimates.get(plan.taken, 0.0),
            exchanged=exchanged,
            trained=trained,
            states=self.config.optimizer_states,
            prefetch=self.config.prefetch,
            tokens=plan.tokens * self.sequences,
            model_flops=3 * (sum(plan.work.products) + sum(plan.work.attentions)),
        )

    @property
    def sequences(self) -> int:
        """How many sequences a call has."""
        dims = self.transformed.plan.token_dims
        sizes = [
            size_estimate(value_of(node).shape[0])
            for node in placeholders(self.transformed.graph)
            if dims.get(node.name)
        ]
        return max(sizes, default=1)

    @faults_of("the graph of backward")
    def backward(self) -> str:
        """Return the graph of backward as code, '' where nothing takes a gradient. The graph is used up."""
        graph, shards, summed = self.transformed.graph, self.sharded_blocks, self.summed
        names = [input_name(node) for node in placeholders(graph)]
        halves = divided(self.transformed, self.inputs, self.config, shards=shards, summed=summed, outlines=False)
        return "" if halves.backward is None else backward_listing(halves.backward, names)

    @property
    def sharded_blocks(self) -> Mapping[int, ParameterShard]:
        """How FSDP shards some of the inputs, those of a block together."""
        return in_blocks(self.transformed, self.shards)

    @property
    def trained(self) -> list[int]:
        """The inputs that are parameters which are trained."""
        return [i for i, x in enumerate(self.inputs) if isinstance(x, torch.nn.Parameter) and x.requires_grad]

    @property
    def summed(self) -> list[int]:
        """The inputs whose gradients are summed over the axis."""
        sums = self.transformed.plan.world_size > 1 and self.config.grad_sync == "sum"
        return [i for i in self.trained if i not in self.shards] if sums else []


def planned_step(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    world_size: int,
    config: Config,
    inner_size: int = 0,
    fully_sharded: FullySharded | None = None,
    machine: Machine | None = None,
) -> Planned:
    """Trace and transform `model` without running it."""
    axis = Axis.in_process(world_size, inner_size)
    config.check_axis(inner_size)
    made: list[Planned] = []

    if fully_sharded is not None and fully_sharded.ranks % world_size:
        raise ConfigError(
            f"FullySharded(ranks={fully_sharded.ranks}): fully_shard shards over all of the {world_size} ranks that share a "
            "sequence, and whole groups of them."
        )

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        shards = {} if fully_sharded is None else fully_sharded.shards_of(example_inputs)
        transformed = transform_dynamo_graph(
            gm, example_inputs, config=config, axis=axis, shards=shards, machine=machine
        )
        made.append(Planned(transformed, tuple(example_inputs), shards, config))

        def stop(*args: Any) -> Any:
            raise _Planned

        return stop

    model = uncompiled(model)
    named = by_name(model.forward, inputs)
    token_length(named, config, mark_dynamic=config.dynamic)
    with contextlib.suppress(_Planned):
        compile_whole(model.forward, backend, config)(**named)
    return made[0]
