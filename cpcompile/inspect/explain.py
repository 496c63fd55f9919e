"""Explain: the plan for a model, read out of the graph of every rank, without processes or GPUs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.regions import regions_of
from cpcompile.balance.layout import local_length
from cpcompile.capture.lowering import placeholders
from cpcompile.choose.attention_sites import REWRITTEN
from cpcompile.choose.machine import H100, Machine, machine_named, this_machine
from cpcompile.choose.rates import PRODUCTS
from cpcompile.compile.outline_layers import outline_layers
from cpcompile.compile.outputs import outputs_of
from cpcompile.compile.transform import Transformed, watching_passes
from cpcompile.errors import ConfigError, module_path, source_place
from cpcompile.inspect.attention_plan import attention_sites, traffic_of
from cpcompile.inspect.explanation import (
    Collective,
    Explanation,
    GatheredValue,
    PassRun,
    ShardedInput,
    Site,
    TokenLocal,
    Work,
)
from cpcompile.inspect.graph_listing import input_name, listing, operator_name
from cpcompile.inspect.planned_step import Planned, planned_step
from cpcompile.inspect.rank_program import rank_program
from cpcompile.inspect.whole_modules import operations, whole_modules
from cpcompile.ir.annotation import annotation
from cpcompile.ir.folding import fold, grouped
from cpcompile.ir.operator_call import is_tensor, size_estimate
from cpcompile.ir.placement import Full
from cpcompile.ir.plan import Lengths
from cpcompile.memory.fully_sharded import FullySharded
from cpcompile.options.config import Config
from cpcompile.runtime.traffic import sends

cp = torch.ops.cpcompile


def explain(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    world_size: int,
    inner_size: int = 0,
    memory: bool = False,
    fully_sharded: FullySharded | None = None,
    ddp: bool = False,
    device: str | Machine = "",
    graphs: bool = False,
    backward: bool = False,
    program: bool = False,
    **options: Any,
) -> Explanation:
    """Return the plan for `model` on `world_size` ranks: nothing is run, and neither GPUs nor processes are needed.

    Args:
        model: the single-device model, on any device; `meta` too.
        inputs: its keyword arguments, on the model's device; their shapes decide, not their values.
        world_size: ranks that share the sequence.
        inner_size: how many of them exchange heads in `strategy="usp"`, where they are a grid.
        memory: also predict what a training step holds on a rank, and estimate what it takes, by kind, which takes a few seconds
            more for each 16 layers.
        fully_sharded: how `fully_shard` is to shard parameters, gradients and optimizer state.
        ddp: `DistributedDataParallel` is to wrap the model, which holds a copy of all gradients.
        device: what costs are estimated for: `h100`, `h200`, `a100`, a file that `cpcompile tune` wrote, or a `Machine`
            (`cpcompile.choose.machine`); '' is this machine. It says how fast kernels and links are, for a model on a GPU or on
            `meta`.
        graphs: also list the graph behind each pass that changes something, which `to_html` shows.
        backward: also list the graph of backward, as it is divided from forward for Inductor; the model is traced once more.
        program: also write the program of every rank as Python that runs.
        options: the fields of `cpcompile.Config`.

    Raises:
        CPError: the model is refused, with the line, the reason and the remedy.
    """
    if not isinstance(memory, bool):
        raise ConfigError(
            f"memory={memory!r}: explain predicts memory (True) or not; memory_budget=... is a plan to look at."
        )
    if ddp and fully_sharded is not None:
        raise ConfigError("explain takes ddp or fully_sharded: a model is wrapped by one of them.")
    config = Config.of({**options, "dynamic": False})
    machine = device if isinstance(device, Machine) else machine_named(device) if device else this_machine()
    seen: dict[str, str] = {}

    def see(name: str, gm: fx.GraphModule, places: int) -> None:
        if places:
            seen[name] = listing(gm)

    plan = partial(
        planned_step,
        model,
        inputs,
        world_size=world_size,
        inner_size=inner_size,
        config=config,
        fully_sharded=fully_sharded,
        machine=machine,
    )
    with watching_passes(see) if graphs else contextlib.nullcontext():
        planned = plan()
    if device and not is_of_gpus(planned.inputs):
        raise ConfigError(
            f"device={machine.name!r} is GPUs, and the model is on the CPU, whose kernels and links are others: give a model and "
            "inputs on the meta device (model.to('meta'), x.to('meta')), or on a GPU."
        )
    gm = planned.transformed.graph
    found = explanation_of(planned.transformed, planned.inputs, machine)
    before, analysed = (listing(graph) for graph in (planned.transformed.original, planned.transformed.analysed))
    found = replace(found, before=before, analysed=analysed, after=listing(gm), graphs=seen)
    of_ranks = rank_program(planned) if program else ""
    # Both change the graph, and are looked at last; the halves have outlined layers, and count them.
    if memory or config.offload != "none":
        found = with_step(found, planned, memory=memory, ddp=ddp)
    elif config.outlines:
        with planned.transformed.counting(outline_layers.__name__) as count:
            count.places = outline_layers(gm)
    of_backward = plan().backward() if backward else ""
    passes = pass_runs(planned.transformed)
    return replace(found, passes=passes, backward=of_backward, program=of_ranks)


def with_step(plan: Explanation, planned: Planned, *, memory: bool, ddp: bool) -> Explanation:
    """Return a plan with the memory and the time of a training step, where they are asked for. The graph is used up."""
    halves = planned.halves()
    if not memory:
        return plan
    ledger = planned.ledger(halves, ddp)
    trained = ledger.phases[-1].held.get("gradients", 0)
    return replace(plan, memory=ledger, step=planned.step_time(halves, plan, trained))


def explanation_of(transformed: Transformed, inputs: Sequence[Any], machine: Machine | None = None) -> Explanation:
    """Return the plan of a transformed graph, without its code and its memory.

    Args:
        transformed: before equal layers of it are outlined.
        inputs: of the graph, parameters included.
        machine: what costs were estimated for; by default this one.
    """
    gm, plan = transformed.graph, transformed.plan
    lengths = Lengths.all_of(gm)
    length = size_estimate(lengths[0].value) if lengths else 0
    names = {node.name: input_name(node) for node in placeholders(gm)}
    sites = tuple(attention_sites(transformed))
    on = (machine or this_machine()) if is_of_gpus(inputs) else None
    return Explanation(
        world_size=plan.world_size,
        inner_size=plan.inner_size,
        tokens=length,
        local_tokens=local_length(length, plan.world_size, plan.layout),
        layout=plan.layout,
        token_inputs={names[name]: dim for name, dim in plan.token_dims.items()},
        sites=sites,
        regions=tuple(TokenLocal(r.name, source_place(r.nodes[0]), len(r.nodes)) for r in regions_of(gm)),
        whole=tuple(whole_modules(gm)),
        inputs=tuple(sharded_inputs(gm)),
        outputs=outputs_of(gm),
        gathered=tuple(gathered_values(gm)),
        collectives=tuple(collectives(transformed)),
        gradient_bytes=gradient_bytes(inputs, plan.world_size, plan.gradient_scale == 1),
        estimates={f"{layout}/{name}": cost for (layout, name), cost in transformed.choice.estimates.items()},
        taken="/".join(transformed.choice.taken),
        before="",
        after="",
        passes=pass_runs(transformed),
        machine=on,
        rated_kernels=transformed.choice.kernels,
        work=work(transformed, sites, on),
    )


def is_of_gpus(inputs: Sequence[Any]) -> bool:
    """Tell whether a graph with these inputs is computed by GPUs; what is on `meta` is."""
    return all(x.device.type != "cpu" for x in inputs if isinstance(x, torch.Tensor))


def pass_runs(transformed: Transformed) -> tuple[PassRun, ...]:
    """Return the passes that ran."""
    return tuple(PassRun(name, changes, transformed.seconds[name]) for name, changes in transformed.changes.items())


def work(transformed: Transformed, sites: Sequence[Site], machine: Machine | None) -> Work:
    """Return what ranks compute in a step; `machine`: None for CPUs."""
    gm, count = transformed.graph, transformed.plan.world_size
    attentions = [sum(4 * site.head_dim * site.pairs[rank] for site in sites if site.pairs) for rank in range(count)]
    products_of = {node: operations(node) for node in gm.graph.nodes if node.op == "call_function"}
    whole = [n for n in products_of if isinstance(annotation(n).placement, Full) and not annotation(n).is_local]
    repeated = sum(products_of[node] for node in whole if node.target not in REWRITTEN)
    every = sum(operations(node) for node in transformed.analysed.graph.nodes if node.target not in REWRITTEN)
    each = (every + repeated * (count - 1)) / count
    products = [int(each)] * count
    rate = PRODUCTS["cpu" if machine is None else "gpu"] * (
        machine.peak / H100.peak if machine and machine.peak else 1.0
    )
    choice = transformed.choice
    seconds = choice.estimates.get(choice.taken, 0.0) + 3 * each / rate
    model_flops = 3 * (sum(products) + sum(attentions))
    mfu = model_flops / seconds / count / machine.peak if machine and machine.peak and seconds else 0.0
    return Work(tuple(products), tuple(attentions), seconds, mfu)


def collective_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the calls of operators that know the group."""
    return [
        node
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and any(a.name == "group" for a in node.target._schema.arguments)
    ]


def sharded_inputs(gm: fx.GraphModule) -> list[ShardedInput]:
    """Return the places where whole values become local tokens."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=cp.shard_tokens.default):
        source = node.args[0]
        if annotation(node).is_local:
            continue  # the heads of a weight
        shape = tuple(size_estimate(n) for n in source.meta["val"].shape) if is_tensor(source) else ()
        name = input_name(source) if source.op == "placeholder" else f"{operator_name(source)} ({source.name})"
        found.append(ShardedInput(name, shape, node.args[1], source_place(node) or "input"))
    return found


def gathered_values(gm: fx.GraphModule) -> list[GatheredValue]:
    """Return the values that are made whole, with what needs them."""
    found = []
    for node in gm.graph.find_nodes(op="call_function", target=cp.gather_tokens.default):
        source = node.args[0]
        shape = tuple(size_estimate(n) for n in node.meta["val"].shape)
        nbytes = math.prod(shape) * node.meta["val"].element_size()
        name = f"{operator_name(source)} ({source.name})"
        found.append(GatheredValue(name, shape, nbytes, annotation(node).reason, source_place(node)))
    return found


def collectives(transformed: Transformed) -> list[Collective]:
    """Return the collectives by operator and module, equal layers together, those that send nothing left out."""
    nodes = [node for node in collective_nodes(transformed.graph) if sends(node.target)]
    of_modules = []
    for same in grouped(nodes, lambda node: (operator_name(node), module_path(node))):
        sent = [traffic_of(node, transformed) for node in same]
        forward, backward = sum(t.forward for t in sent), sum(t.backward for t in sent)
        of_modules.append(Collective(operator_name(same[0]), module_path(same[0]), len(same), forward, backward))
    folded = fold(of_modules, lambda one: one.module, lambda one: one.operator)
    return [
        Collective(
            group[0].operator,
            path,
            sum(one.calls for one in group),
            sum(one.forward_bytes for one in group),
            sum(one.backward_bytes for one in group),
        )
        for path, group in folded
    ]


def gradient_bytes(inputs: Sequence[Any], world_size: int, is_summed: bool) -> int:
    """Return what one rank sends to sum the gradients of the parameters among the inputs (a ring all-reduce)."""
    total = sum(x.nbytes for x in inputs if isinstance(x, torch.nn.Parameter) and x.requires_grad)
    return 2 * total * (world_size - 1) // world_size if is_summed else 0
