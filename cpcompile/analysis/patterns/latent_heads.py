"""Latent heads: how to compute some heads of keys and values from their latent, without computing the others.

Heads go up through what keys and values are computed from by the same rules as tokens: they are another dim. Where they reach a
weight, a rank needs its own rows of it; where a dim holds none, as that of a rotary key that all heads share, it needs all.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from cpcompile.analysis.patterns.latent import Latent, find_latent, sharded_values
from cpcompile.choose.attention import Expansion
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Full, Sharded
from cpcompile.rules import RULES, Decision


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How each rank computes its own heads.

    Attributes:
        num_heads: the key heads of all ranks.
        decisions: what changes of each operator that computes some heads only.
        parts: the values from outside of the expansion of which a rank needs its own heads, weights, and where these are.
    """

    num_heads: int
    decisions: Mapping[fx.Node, Decision]
    parts: Mapping[fx.Node, Sharded] = field(default_factory=dict)


def plan_heads(attention: fx.Node, latent: Latent) -> HeadPlan | None:
    """Return how some heads are computed, or None where all are needed for any of them."""
    call = Call.of(attention)
    num_heads = call.shape("k")[1]
    if call["mask"] is not None or not isinstance(num_heads, int):
        return None
    wanted: dict[fx.Node, Full | Sharded] = {call["k"]: Sharded(1), call["v"]: Sharded(1)}
    decisions: dict[fx.Node, Decision] = {}
    for node in reversed(latent.expansion):
        at = wanted.setdefault(node, FULL)
        found: dict[fx.Node, Full | Sharded] | None = dict.fromkeys(node.all_input_nodes, FULL)
        if isinstance(at, Sharded) and node.target is operator.getitem:
            found = {node.args[0]: at}  # type: ignore[dict-item]
        elif isinstance(at, Sharded):
            decision = decide(node, at, num_heads)
            found = None if decision is None else operands_of(node, decision)
            if decision is not None:
                decisions[node] = decision
        if found is None or any(wanted.setdefault(operand, p) != p for operand, p in found.items()):
            return None
    if any(isinstance(wanted.get(value), Sharded) for value in latent.cut):
        return None
    outside = {value: at for value, at in wanted.items() if isinstance(at, Sharded) and value not in latent.expansion}
    return HeadPlan(num_heads, decisions, outside)


def decide(node: fx.Node, at: Sharded, num_heads: int) -> Decision | None:
    """Return how an operator computes some heads, by its rule."""
    if node.target not in RULES:
        return None
    decision = RULES[node.target].pull(Call.of(node), at, num_heads)
    if decision is None or decision.lower or decision.padding or any(result != at for result in decision.results):
        return None
    return decision


def operands_of(node: fx.Node, decision: Decision) -> dict[fx.Node, Full | Sharded] | None:
    """Return what each operand must be, those left out of which only the metadata is read; None if one must be two things."""
    found: dict[fx.Node, Full | Sharded] = {}
    for name, operand in Call.of(node).operands():
        at = decision.operands.get(name)
        if at is None:
            continue
        assert isinstance(at, Full | Sharded)
        if found.setdefault(operand, at) != at:
            return None
    return found


def expansions_of(attentions: Sequence[fx.Node], token_dims: Mapping[str, int]) -> list[Expansion | None]:
    """Return what the cost of the latent of each attention of a graph depends on, None for one that has none."""
    sharded = sharded_values(attentions[0].graph, token_dims) if attentions else set()
    found: list[Expansion | None] = []
    for attention in attentions:
        latent = find_latent(attention, token_dims, sharded)
        by_heads = latent is not None and plan_heads(attention, latent) is not None
        found.append(replace(latent.numbers, by_heads=by_heads) if latent is not None else None)
    return found
