"""Guard padding: an operator that is not finite everywhere takes a number where it is in slots that hold no token.

before  y = aten.div(x, norm)                               # norm: Sharded(1), zeros behind an attention in padding slots
after   norm_1 = cp.fill_padding(norm, 1, 1, 1.0, ...)      # the tokens are as they were
        y = aten.div(x, norm_1)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.signs import is_at_most_zero, is_positive
from cpcompile.ir.annotation import annotation, placement_of
from cpcompile.ir.operator_call import Call, is_tensor
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Plan
from cpcompile.ir.resharding import Resharder
from cpcompile.rules.undefined import finite_at

aten, cp = torch.ops.aten, torch.ops.cpcompile


def guard_padding(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many operands were filled.

    Needs: placements (`place_tokens`).
    Gives: values and gradients that are finite in all slots, if they are for all tokens.
    """
    resharder, count = Resharder(gm, plan), 0
    repeating: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        call = Call.of(node)
        changes: dict[str, fx.Node] = {}
        for name, harmless in finite_at(call).items():
            operand = dict(call.operands())[name]
            at = placement_of(operand)
            if not isinstance(at, Sharded) or (operand in repeating and at.covers_all):
                continue
            has_sign = {1: is_positive, -1: is_at_most_zero}.get(harmless.sign)
            if is_filled(operand) or (has_sign is not None and has_sign(operand)):
                continue
            filled = resharder.fill_padding(operand, at, harmless.number, node)
            if filled is not operand:
                changes[name] = filled
        if changes:
            node.args, node.kwargs = call.rebound(changes)
            count += len(changes)
        if repeats_tokens(call, repeating):
            repeating.add(node)
    return count


def is_filled(operand: fx.Node) -> bool:
    """Tell whether padding slots were filled, of each sequence where several are joined."""
    if operand.target in (aten.cat.default, aten.flatten.using_ints):
        return all(map(is_filled, operand.all_input_nodes))
    return operand.target is cp.fill_padding.default


def repeats_tokens(call: Call, repeating: set[fx.Node]) -> bool:
    """Tell whether padding slots hold what some token has: of tokens that were sharded, and of each by itself since then."""
    if call.target is cp.shard_tokens.default:
        return True
    known = annotation(call.node)
    is_random = torch.Tag.nondeterministic_seeded in call.target.tags
    if known.is_local or is_random or call.target.namespace == "cpcompile" or not isinstance(known.placement, Sharded):
        return False

    def is_as_for_tokens(operand: fx.Node) -> bool:
        of = annotation(operand)
        is_whole = isinstance(of.placement, Full) and not of.is_local
        return is_whole or (operand in repeating and placement_of(operand).covers_all)  # type: ignore[union-attr]

    return all(is_as_for_tokens(operand) for operand in call.node.all_input_nodes if is_tensor(operand))
