"""Finish outputs: add up partial sums, gather what is wanted whole, and count each rank's gradient once.

before  return (loss, logits)                                      # loss: Partial(sum), logits: Sharded(1)
after   loss = cp.scale_gradient(cp.all_reduce(loss), 1 / P)       # every rank returns it, so each back-propagates 1 / P of it
        return (loss, logits)                                      # with outputs="full": cp.gather_tokens(logits, 1)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.operator_call import is_tensor
from cpcompile.ir.placement import FULL, Full, Partial, Sharded
from cpcompile.ir.plan import Plan
from cpcompile.ir.resharding import Resharder

cp = torch.ops.cpcompile


def finish_outputs(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many outputs were changed.

    Needs: every `Partial` is an addend of each rank (`rewrite_reductions`).
    Gives: outputs that are `Full` or `Sharded`, and gradients that count once.
    """
    (output,) = gm.graph.find_nodes(op="output")
    finished: dict[fx.Node, fx.Node] = {}

    def finish(node: fx.Node) -> fx.Node:
        if node not in finished:
            with gm.graph.inserting_before(output):
                finished[node] = finished_output(gm, node, plan) if is_tensor(node) else node
        return finished[node]

    output.args = fx.map_arg(output.args, finish)
    return sum(new is not old for old, new in finished.items())


def finished_output(gm: fx.GraphModule, node: fx.Node, plan: Plan) -> fx.Node:
    """Return what the graph returns for `node`."""
    placement = placement_of(node)
    if isinstance(placement, Partial):
        node = insert_copy(gm.graph, cp.all_reduce.default, (node, plan.world_size, plan.group), node)
    is_part = isinstance(placement, Sharded) and not placement.covers_all
    if is_part and plan.outputs != "full" and plan.strict:
        raise NoRule(
            f"an output holds other tokens than the sequence has ({placement}), which ranks cannot return in equal parts."
            f"\n\n{where(node)}\n\nReturn all tokens, and slice or pad after cpcompile.unshard; or have it gathered with "
            "outputs='full' or strict=False."
        )
    if isinstance(placement, Sharded) and (plan.outputs == "full" or is_part):
        node = Resharder(gm, plan).gather(node, "it is an output")
        placement = FULL
    if node.op != "call_function" or not node.meta["val"].is_floating_point():
        return node
    is_replicated = not isinstance(placement, Sharded)
    scale = plan.gradient_scale / (plan.world_size if is_replicated else 1)
    if scale == 1:
        return node
    return insert_copy(gm.graph, cp.scale_gradient.default, (node, scale), node, FULL if is_replicated else placement)


def output_placements(gm: fx.GraphModule) -> list[Full | Sharded | None]:
    """Return the placement of each output of a finished graph; None for what is no tensor."""
    (output,) = gm.graph.find_nodes(op="output")
    placements: list[Full | Sharded | None] = []
    for node in output.args[0]:
        placement = placement_of(node) if is_tensor(node) else None
        assert not isinstance(placement, Partial)
        placements.append(placement)
    return placements
