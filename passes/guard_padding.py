"""Guard padding: an operator that is not finite everywhere takes a number where it is in slots that hold no token.

A token-local region, of which only the rows are known, takes the row of a token there.

before  y = aten.div(x, norm)                               # norm: Sharded(1), zeros behind an attention in padding slots
after   norm_1 = aten.masked_fill(norm, is_outside, 1)      # is_outside: of the slots, by cp.positions
        y = aten.div(x, norm_1)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.regions.find import Region, regions_of
from cpcompile.analysis.regions.place import replace_inputs
from cpcompile.analysis.signs import is_at_most_zero, is_positive
from cpcompile.ir.annotation import annotation, placement_of
from cpcompile.ir.operator_call import Call, is_tensor
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Plan
from cpcompile.ir.resharding import Resharder, Writer
from cpcompile.rules.over_tokens import as_value_of, counted, outside_of, with_number
from cpcompile.rules.undefined import INDEXED, finite_at

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
        call, changes = Call.of(node), dict[str, fx.Node]()
        for name, (operand, number) in unguarded(call, repeating).items():
            filled = with_number(resharder, operand, call, number)
            if filled is not operand:
                changes[name] = filled
        if changes:
            node.args, node.kwargs = call.rebound(changes)
            count += len(changes)
        if repeats_tokens(call, repeating):
            repeating.add(node)
    return count + sum(guard_region(region, resharder, repeating) for region in regions_of(gm))


def guard_region(region: Region, resharder: Resharder, repeating: set[fx.Node]) -> int:
    """Return how many inputs of a region were filled."""
    calls = [Call.of(node) for node in region.nodes if isinstance(node.target, torch._ops.OpOverload)]
    if not any(call.target not in INDEXED and finite_at(call) for call in calls):
        return 0
    new: dict[fx.Node, fx.Node | int] = {}
    for operand in filter(is_tensor, region.inputs):
        at = placement_of(operand)
        is_known = not isinstance(at, Sharded) or (operand in repeating and at.covers_all)
        if is_known or holds_rows(operand) or is_filled(operand, 1.0):
            continue
        assert isinstance(at, Sharded)
        reader = next(call for call in calls if operand in call.node.all_input_nodes)
        if resharder.lengths(at).parts:  # a rank may have rows of one sequence, and none of another
            filled = with_number(resharder, operand, reader, 1.0)
        else:
            filled = with_rows_of_tokens(Writer(resharder, reader, at), at, operand)
        if filled is not operand:
            new[operand] = filled
    replace_inputs(region, new)
    return len(new)


def with_rows_of_tokens(writer: Writer, at: Sharded, x: fx.Node) -> fx.Node:
    """Write `x` with the row of a token, if this rank has one, in the slots that hold none; no gradient comes from these."""
    is_outside = outside_of(writer, at, x)
    if is_outside is None:
        return x
    place = counted(writer, x, writer.insert(aten.sym_size.int, x, at.dim))
    place = writer.insert(aten.masked_fill.Scalar, place, writer.insert(aten.flatten.using_ints, is_outside), 0)
    last = writer.insert(aten.amax.default, place, [0], True)
    row = writer.insert(aten.index_select.default, writer.insert(aten.detach.default, x), at.dim, last)
    return as_value_of(writer.insert(aten.where.self, is_outside, row, x), x)


def holds_rows(operand: fx.Node) -> bool:
    """Tell whether rows of tokens are in the slots that hold none."""
    return operand.target is aten.where.self and Call.of(operand)["self"].target is aten.index_select.default


def unguarded(call: Call, repeating: set[fx.Node]) -> dict[str, tuple[fx.Node, float]]:
    """Return the operands that may hold a number that is not harmless where there is no token, each with one that is."""
    found, operands = {}, dict(call.operands())
    for name, harmless in finite_at(call).items():
        operand = operands[name]
        at = placement_of(operand)
        if not isinstance(at, Sharded) or (operand in repeating and at.covers_all):
            continue
        has_sign = {1: is_positive, -1: is_at_most_zero}.get(harmless.sign)
        if not is_filled(operand, harmless.number) and not (has_sign is not None and has_sign(operand)):
            found[name] = operand, harmless.number
    return found


def is_filled(operand: fx.Node, number: float) -> bool:
    """Tell whether slots without a token were filled with a number, those of each sequence where several are joined."""
    if operand.target in (aten.cat.default, aten.flatten.using_ints):
        return all(is_filled(part, number) for part in operand.all_input_nodes)
    if operand.target not in (aten.masked_fill.Scalar, cp.fill_padding.default):
        return False
    call = Call.of(operand)
    return bool(call["value"] == number) and ("mask" not in call or annotation(call["mask"]).is_local)


def repeats_tokens(call: Call, repeating: set[fx.Node]) -> bool:
    """Tell whether padding slots hold what some token has: of tokens that were dealt, and of each by itself since then."""
    if call.target in (cp.shard_tokens.default, cp.exchange_dims.default):
        return True
    known = annotation(call.node)
    if known.region:  # only its inputs and results have placements
        return False
    is_random = torch.Tag.nondeterministic_seeded in call.target.tags
    if known.is_local or is_random or call.target.namespace == "cpcompile" or not isinstance(known.placement, Sharded):
        return False

    def is_as_for_tokens(operand: fx.Node) -> bool:
        of = annotation(operand)
        is_whole = isinstance(of.placement, Full) and not (of.is_local or of.region)
        return is_whole or (operand in repeating and placement_of(operand).covers_all)  # type: ignore[union-attr]

    return all(is_as_for_tokens(operand) for operand in call.node.all_input_nodes if is_tensor(operand))
