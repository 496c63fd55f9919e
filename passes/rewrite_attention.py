"""Rewrite attention: a sharded attention becomes one context-parallel operator.

before  o = cp.attention(q, k, v, None, None, None, 0.125, True, 0, 0.0)                     # q, k, v: Sharded(2)
after   bounds = cp.document_bounds(documents)                                                # once in a graph, if any
        o = cp.ring_attention(q, k, v, None, None, None, 0.125, True, 0, 0.0, length=S, layout="zig_zag", ...)[0]
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import value_numbers
from cpcompile.choose.attention import Ranks
from cpcompile.choose.attention_sites import attention_site
from cpcompile.errors import ConfigError, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_document_bounds, replace_uses
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.rules.attention import QUERY_TOKENS
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.registration import LAYER

cp = torch.ops.cpcompile

OPERATORS = {strategy: getattr(cp, f"{strategy}_attention").default for strategy in STRATEGIES}


def rewrite_attention(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many attentions were rewritten.

    Needs: placements (`place_tokens`), strategies (`choose_strategies`), seeds of dropped weights (`rewrite_dropout`).
    Gives: the operator of `cpcompile.runtime.attention` of each strategy, with all that it must know as arguments.

    Raises:
        ConfigError: an attention cannot be computed by its strategy.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=cp.attention.default)
    sites = [node for node in nodes if is_along_one_sequence(node)]
    bounds = insert_bounds(gm, sites)
    for node in sites:
        lower(gm, node, bounds.get(Call.of(node)["documents"]), plan)
    return len(sites)


def is_along_one_sequence(node: fx.Node) -> bool:
    """Tell whether an attention is one of local rows that needs other tokens' keys, or has them from a latent."""
    call = Call.of(node)
    placements = [placement_of(call[name]) for name in ("q", "k")]
    is_latent = STRATEGIES[annotation(node).strategy].is_latent
    if is_latent and isinstance(placements[0], Sharded):
        return str(call.shape("q")[2]) == str(call.shape("k")[2])
    if annotation(node).strategy == "latent_heads":
        raise ConfigError(
            f"strategy='latent_heads' cannot compute this attention: its queries are not sharded.\n\n{where(node)}\n\n"
            "Use strategy='latent' or 'gather'."
        )
    return isinstance(placements[1], Sharded) and placements[1].dim == QUERY_TOKENS.dim


def insert_bounds(gm: fx.GraphModule, sites: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Return where the documents begin, for each node of documents that attentions take.

    The host must know that to compute and send only what is visible. To find out, it waits for the device: once a step,
    since all layers share the answer, however often the model built its documents.
    """
    users: dict[fx.Node, fx.Node] = {}  # the first attention that takes them
    for site in sites:
        documents = Call.of(site)["documents"]
        if documents is not None:
            users.setdefault(documents, site)
    numbers = value_numbers(gm.graph) if users else {}
    of_layout = Lengths.bounds_of(gm) if users else []
    found = {numbers[bounds.all_input_nodes[0]]: bounds for bounds in of_layout}
    for documents, site in users.items():
        if numbers[documents] not in found:
            found[numbers[documents]] = insert_document_bounds(site, documents)
    return {documents: found[numbers[documents]] for documents in users}


def lower(gm: fx.GraphModule, node: fx.Node, bounds: fx.Node | None, plan: Plan) -> None:
    """Replace one attention by the operator of its strategy.

    Where the rows of a mask are computed from the tokens themselves, each rank has those of its own queries; strategies that
    exchange heads would need them all, so that the keys are gathered instead.
    """
    call, known, at = Call.of(node), annotation(node), placement_of(node)
    asked = STRATEGIES[known.strategy]
    assert isinstance(at, Sharded)
    has_rows = call["mask"] is not None and isinstance(placement_of(call["mask"]), Sharded)
    is_sharded = isinstance(placement_of(call["k"]), Sharded)
    needs_gather = is_sharded if asked.is_latent else has_rows and asked.takes_whole_mask
    strategy = "gather" if needs_gather else known.strategy
    refuse_unable(node, strategy, plan)
    lengths = Lengths.of(gm, at.sequence)
    terms, _ = call.rebound({"kernel_name": plan.kernel, "bounds": bounds or lengths.bounds})
    axis = axis_arguments(OPERATORS[strategy], replace(plan, layout=lengths.layout or plan.layout), lengths.total)
    with gm.graph.inserting_before(node):
        collective = gm.graph.call_function(OPERATORS[strategy], terms, axis)
        out = gm.graph.call_function(operator.getitem, (collective, 0))
    for new in (collective, out):
        new.meta = dict(node.meta)
        annotate(new, origin="", site=known.site or node.name)
    replace_uses(node, out)
    gm.graph.erase_node(node)


def refuse_unable(node: fx.Node, strategy: str, plan: Plan) -> None:
    """Refuse a strategy that cannot compute an attention exactly, or not as it promises.

    Raises:
        ConfigError: with the user's line, the reason and the remedy.
    """
    obstacle = attention_site(node).obstacle(strategy, Ranks(plan.world_size, plan.inner_size))
    if obstacle is not None:
        raise ConfigError(
            f"strategy={strategy!r} cannot compute this attention: {obstacle.reason}.\n\n{where(node)}\n\n"
            f"{obstacle.remedy}, or leave the choice to strategy='auto'."
        )


def axis_arguments(target: Any, plan: Plan, length: fx.Node | int) -> dict[str, Any]:
    """Return the keyword arguments of an attention operator, which are fields of the plan but for the length."""
    names = [argument.name for argument in target._schema.arguments if argument.kwarg_only and argument.name != LAYER]
    return {name: length if name == "length" else getattr(plan, name) for name in names}
