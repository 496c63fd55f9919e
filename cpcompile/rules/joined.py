"""Joined and grouped tokens: what is done where tokens are not one sequence in its order, or change how they are grouped.

before  x = aten.cat([text, image], 1); o = cp.attention(q, k, v); y = aten.slice(o, 1, L); p = aten.view(x, [B, S // 4, 4, D])
after   x is a joined sequence, of which every rank has its part of the text and of the image; attention sees the slots of all
        ranks, laid end to end (`joined_attention`); y is the image again (`joined_cuts`); the tokens of x go in groups of 4 to
        the ranks that hold these (`regrouping`)

Order is what costs: an operator that needs it gets the tokens as one sequence, which travel for that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.balance.layout import follows_documents
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.joining import Joiner
from cpcompile.ir.operator_call import JOINS, Call, value_of
from cpcompile.ir.placement import Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.rules.joined_attention import SlotAttention
from cpcompile.rules.joined_cuts import CUTS, SPLITS, Cuts
from cpcompile.rules.localisation import Localiser
from cpcompile.rules.registry import Decision
from cpcompile.rules.regrouping import Regrouper

aten, cp = torch.ops.aten, torch.ops.cpcompile

# Operators whose rules write others that do not ask how the tokens are dealt to the ranks.
LOCAL_LOWERINGS = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}


class JoinedTokens:
    """Changes calls, so that rules apply which know only one sequence in its order."""

    def __init__(self, joiner: Joiner, localiser: Localiser) -> None:
        self.joiner, self.localiser, self.gm = joiner, localiser, joiner.gm
        self.regrouper = Regrouper(joiner)
        cuts, attention = Cuts(joiner), SlotAttention(joiner, self.align, self.straighten)
        # What takes the place of a call.
        self.replacements = {
            **dict.fromkeys(SPLITS, cuts.split),
            **dict.fromkeys(CUTS, cuts.cut),
            aten.slice_scatter.default: cuts.scatter,
            cp.attention.default: attention.attend,
        }
        # What lets a rule apply, the cheapest first; each edits the operands of a call, and tells whether it did.
        regrouper = self.regrouper
        self.changes = (self.align, regrouper.regroup, regrouper.group, regrouper.pad_groups, self.straighten)

    def is_joined(self, at: Placement) -> bool:
        """Tell whether a value has the tokens of several sequences behind one another."""
        return isinstance(at, Sharded) and bool(Lengths.of(self.gm, at.sequence).parts)

    def takes(self, call: Call, decision: Decision) -> bool:
        """Tell whether a decision is right for joined tokens, whose order and ranges no rank knows by arithmetic."""
        is_local = decision.lower is None or call.target in LOCAL_LOWERINGS
        draws = torch.Tag.nondeterministic_seeded in call.target.tags and self.joiner.plan.exact_dropout
        are_whole = all(at.covers_all for at in decision.results if isinstance(at, Sharded) and self.is_joined(at))
        return is_local and are_whole and not draws

    def replace(self, node: fx.Node, call: Call) -> list[fx.Node] | None:
        """Put others in the place of a call on joined tokens; nobody reads its result then.

        Returns the new calls that are to be placed, in their order; None where the call stays.
        """
        replacement = self.replacements.get(call.target)
        return replacement(node, call) if replacement else None

    def join(self, node: fx.Node, call: Call) -> bool:
        """Join operands along their tokens, each of which becomes a sequence of its own; tells whether that is what is done."""
        if call.target not in JOINS:
            return False
        dim = int(call["dim"]) % call.result.dim()
        # What has no element is left where it is: torch joins an empty vector with anything.
        operands = {n: x for n, x in call.operands() if len(call.shape(n)) > dim and str(call.shape(n)[dim]) != "0"}
        placements = {name: placement_of(operand) for name, operand in operands.items()}
        if any(isinstance(at, Sharded) and at.dim != dim for at in placements.values()):
            return False
        parts: list[tuple[int, int]] = []
        changes: dict[str, fx.Node] = {}
        for name, operand in operands.items():
            at, size = placements[name], call.shape(name)[dim]
            if not isinstance(at, Sharded):
                to = Sharded(dim, sequence=self.joiner.sequence(size, node))
                changes[name] = self.localiser.localise(operand, to)
            else:
                outer = self.joiner.outer_of(size, at)
                is_held = at.covers_all and isinstance(outer, int)
                changes[name] = operand if is_held else self.joiner.plain(operand)
                to = self.joiner.in_slots(size, at, node) if is_held else placement_of(changes[name])  # type: ignore[assignment]
            parts += self.joiner.parts_of(to)
        node.args, node.kwargs = call.rebound(changes)
        annotate(node, placement=Sharded(dim, sequence=self.joiner.joined(tuple(parts), node)))
        return True

    def straighten(self, node: fx.Node, call: Call) -> bool:
        """Deal operands to the ranks as one sequence in its order; tells whether any was not."""
        changes = {}
        for name, operand in call.operands():
            at = placement_of(operand)
            if not isinstance(at, Sharded) or not self.joiner.can_rearrange(at):
                continue
            if not at.covers_all or not self.joiner.is_plain(value_of(operand).shape[at.dim], at):
                changes[name] = self.joiner.plain(operand)
        if changes:
            node.args, node.kwargs = call.rebound(changes)
        return bool(changes)

    def chunk(self, node: fx.Node, call: Call) -> bool:
        """Deal operands to the ranks in equal chunks where the layout follows documents; tells whether there were any."""
        sharded = {name: (x, at) for name, x in call.operands() if isinstance(at := placement_of(x), Sharded)}
        changes = {n: self.joiner.rearranged(x, self.joiner.in_chunks(at)) for n, (x, at) in sharded.items()}
        changes = {name: x for name, x in changes.items() if x is not sharded[name][0]}
        node.args, node.kwargs = call.rebound(changes)
        return bool(changes)

    def align(self, node: fx.Node, call: Call) -> bool:
        """Bring operands that hold as many tokens in different sequences to one of these; tells whether there were any."""
        sharded = {n: (o, p) for n, o in call.operands() if isinstance(p := placement_of(o), Sharded)}
        kinds = {replace(at, dim=0, outside=None) for _, at in sharded.values()}
        sizes = {str(value_of(operand).shape[at.dim]) for operand, at in sharded.values()}
        if len(kinds) < 2 or len(sizes) > 1:
            return False

        def cost(at: Sharded) -> tuple[Any, ...]:
            # To the last field, so that all ranks choose the same.
            return not at.covers_all, self.is_joined(at), at.inner, at.sequence, at.front, at.back

        to = min(kinds, key=cost)
        changes = {
            name: self.joiner.rearranged(operand, replace(to, dim=at.dim)) for name, (operand, at) in sharded.items()
        }
        node.args, node.kwargs = call.rebound(changes)
        return True

    def output(self, node: fx.Node) -> fx.Node:
        """Return what a rank gives back for a value: its part of one sequence, as `unshard` and `shard` know it."""
        at = annotation(node).placement
        if self.joiner.plan.outputs == "full" or not isinstance(at, Sharded) or at.reaches_outside:
            return node
        if self.joiner.in_order(at) != at:
            return self.joiner.rearranged(node, self.joiner.in_order(at))
        is_one = self.joiner.outer_of(value_of(node).shape[at.dim], at) == 1
        is_other = not at.covers_all or (at.inner != 1 and is_one)
        is_other = is_other and not follows_documents(self.joiner.plan.layout)
        return self.joiner.plain(node) if self.is_joined(at) or is_other else node
