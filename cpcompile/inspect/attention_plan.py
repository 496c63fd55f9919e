"""Attention plan: how each attention of a model is computed, and what it sends, computes and holds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.choose.attention_sites import attention_nodes, rewritten_attentions
from cpcompile.choose.kernels import chosen_kernels, sized, strategy_of
from cpcompile.compile.transform import Transformed
from cpcompile.errors import module_path, source_place
from cpcompile.inspect.explanation import (
    Site,
)
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call, size_estimate
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.passes.lift_masks import describe
from cpcompile.runtime.attention.heads import most_rounds, rounds
from cpcompile.runtime.attention.workload import Memory, Workload, memory_of, work_of
from cpcompile.runtime.traffic import Traffic, attention_workload, traffic

cp = torch.ops.cpcompile


def local_arguments(node: fx.Node, transformed: Transformed) -> dict[str, Any]:
    """Return the arguments of a call with meta tensors in the shapes that a rank holds."""

    def local(argument: fx.Node) -> Any:
        value, placement = argument.meta["val"], annotation(argument).placement
        if not isinstance(value, torch.Tensor):
            return size_estimate(value)
        shape = [size_estimate(n) for n in value.shape]
        if isinstance(placement, Sharded) and not annotation(argument).is_local:
            lengths = Lengths.of(transformed.graph, placement.sequence)
            slots = lengths.local if isinstance(lengths.local, int) else size_estimate(lengths.local.meta["val"])
            shape[placement.dim] = shape[placement.dim] // placement.count(size_estimate(lengths.value)) * slots
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return {name: fx.map_arg(argument, local) for name, argument in Call.of(node).arguments.items()}


def traffic_of(node: fx.Node, transformed: Transformed) -> Traffic:
    """Return what one rank sends for this call."""
    assert isinstance(node.target, torch._ops.OpOverload)
    return traffic(node.target, local_arguments(node, transformed))


def attention_sites(transformed: Transformed) -> list[Site]:
    """Return the attentions in order; those that exchange nothing have no strategy."""
    plan = transformed.plan
    sites = []
    for node, made in made_attentions(transformed):
        call = Call.of(node)
        q, k = call.shape("q"), call.shape("k")
        kernels = () if made is None else chosen_kernels(made, plan.kernel)
        numbers = numbers_of(made, transformed) if made is not None and strategy_of(made) else NOTHING
        of_latent = latent_traffic(node, transformed)
        sites.append(
            Site(
                module=module_path(node),
                line=source_place(node),
                heads=size_estimate(q[1]),
                kv_heads=size_estimate(k[1]),
                head_dim=size_estimate(q[3]),
                mask=describe(node),
                strategy=how_computed(made),
                layout=plan.layout,
                kernels=tuple(dict.fromkeys(chosen.name for chosen in kernels)),
                reasons=tuple(dict.fromkeys(reason for chosen in kernels for reason in chosen.reasons)),
                forward_bytes=numbers.sent.forward + of_latent.forward,
                backward_bytes=numbers.sent.backward + of_latent.backward,
                pairs=numbers.pairs,
                kept_bytes=numbers.memory.kept,
                received_bytes=numbers.memory.received,
                rounds_again=numbers.rounds_again,
                workload=numbers.workload,
            )
        )
    return sites


@dataclass(frozen=True, slots=True)
class Numbers:
    """What an attention sends, computes and holds."""

    sent: Traffic
    pairs: tuple[int, ...]
    memory: Memory
    rounds_again: int
    workload: Workload | None = None


NOTHING = Numbers(Traffic(0, 0), (), Memory(0, 0), 0)


def numbers_of(node: fx.Node, transformed: Transformed) -> Numbers:
    """Return the numbers of a collective attention."""
    plan, strategy = transformed.plan, strategy_of(node)
    workload = attention_workload(sized(Call.of(node)))
    if strategy == "latent_heads":  # the operator has the key heads of one rank
        workload = replace(workload, kv_heads=workload.kv_heads * plan.world_size)
    pairs = tuple(work_of(workload, strategy, rank) for rank in range(plan.world_size))
    again = num_rounds_again(workload, strategy)
    return Numbers(traffic_of(node, transformed), pairs, memory_of(workload, strategy), again, workload)


def num_rounds_again(workload: Workload, strategy: str) -> int:
    """Return in how many rounds backward exchanges heads once more; 0 where they are kept, or never exchanged."""
    inner = workload.inner(strategy)
    if inner == 1 or workload.keeps_rounds:
        return 0
    most = most_rounds(workload.layout, is_ring=inner < workload.world_size)
    return len(rounds(inner, workload.heads, workload.kv_heads, most, workload.heads_per_message))


def latent_traffic(attention: fx.Node, transformed: Transformed) -> Traffic:
    """Return what one rank sends for the values that an attention's keys and values are computed from."""
    marks = transformed.graph.graph.find_nodes(op="call_function", target=cp.whole_tokens.default)
    sources = [mark.args[0] for mark in marks if annotation(mark).site == attention.name]
    sent = [traffic_of(node, transformed) for node in sources if node.target is cp.gather_tokens.default]
    return Traffic(sum(t.forward for t in sent), sum(t.backward for t in sent))


def made_attentions(transformed: Transformed) -> list[tuple[fx.Node, fx.Node | None]]:
    """Return the attentions in order, each with the node that computes it in the graph of every rank."""
    made = {annotation(n).site or n.name: n for n in rewritten_attentions(transformed.graph)}
    return [(node, made.get(node.name)) for node in attention_nodes(transformed.analysed)]


def how_computed(made: fx.Node | None) -> str:
    """Return the strategy of an attention, or how it is computed where it exchanges nothing."""
    if made is not None and strategy_of(made):
        return strategy_of(made)
    is_local = made is not None and isinstance(annotation(made).placement, Sharded)
    return "local queries, whole keys" if is_local else "whole on every rank"
