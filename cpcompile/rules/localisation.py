"""Localisation: a rank computes its own tokens of a whole value, from local operands as far up as rules allow.

before  c = aten.cos(position)                                       # wanted: Sharded(0)
after   c = aten.cos(position)                                       # dead, if nothing else reads it
        c_1 = aten.cos(cp.shard_tokens(position, 0))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.ir.resharding import Resharder
from cpcompile.rules import RULES, Decision, Local

aten = torch.ops.aten

# A reshape works on local tokens whatever the strides; a view of an operand that a collective made may not.
COPYING = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


class Localiser:
    """Computes local tokens; those of one value are computed once."""

    def __init__(self, resharder: Resharder) -> None:
        self.resharder = resharder
        self._localised: dict[tuple[fx.Node, Sharded], fx.Node] = {}

    def localise(self, node: fx.Node, wanted: Sharded) -> fx.Node:
        """Return this rank's tokens of the whole value `node`: recomputed from local operands as far up as rules allow."""
        key = (node, wanted)
        if key not in self._localised:
            decision = self.pull(node, wanted)
            if decision is None:
                self._localised[key] = self.resharder.shard(node, wanted)
            else:
                self._localised[key] = self._copy_locally(node, decision)
        return self._localised[key]

    def pull(self, node: fx.Node, wanted: Sharded) -> Decision | None:
        """Return how local tokens of `node` are computed from local tokens of its operands, None where they are not."""
        if node.op != "call_function" or node.target not in RULES:
            return None
        call = Call.of(node)
        is_random = torch.Tag.nondeterministic_seeded in call.target.tags
        if call.is_tuple or is_random:
            return None
        if not all(isinstance(placement_of(operand), Full) for _, operand in call.operands()):
            return None
        return RULES[call.target].pull(call, wanted, self.resharder.lengths(wanted).value)

    def _copy_locally(self, node: fx.Node, decision: Decision) -> fx.Node:
        call = Call.of(node)
        changes: dict[str, Any] = dict(decision.arguments)
        for name, operand in call.operands():
            wanted = decision.operands.get(name)
            if isinstance(wanted, Sharded):
                changes[name] = self.localise(operand, wanted)
        # A layout of documents is known behind what they are computed from, which `node` may be a part of.
        local = [operand for operand in changes.values() if isinstance(operand, fx.Node)]
        with self.resharder.gm.graph.inserting_after(max([node, *local, *Lengths.bounds_of(self.resharder.gm)])):
            copy = self.resharder.gm.graph.node_copy(node)
        copy.meta = dict(node.meta)
        self.apply(copy, call, changes)
        annotate(copy, placement=decision.results[0], origin=annotation(node).origin)
        return copy

    def apply(self, node: fx.Node, call: Call, changes: Mapping[str, Any]) -> None:
        """Give a call the arguments of one rank; a view becomes a reshape."""
        changes = {name: self._localise_sizes(value, node) for name, value in changes.items()}
        target = COPYING.get(call.target)
        if target is not None and "size" in changes:
            node.target, node.args, node.kwargs = target, (changes["self"], changes["size"]), {}
        else:
            node.args, node.kwargs = call.rebound(changes)

    def _localise_sizes(self, value: Any, node: fx.Node) -> Any:
        if isinstance(value, Local):
            return self.resharder.lengths(value.at).localise(self.resharder.gm, value.size, value.at, node)
        return [self._localise_sizes(item, node) for item in value] if isinstance(value, list) else value
