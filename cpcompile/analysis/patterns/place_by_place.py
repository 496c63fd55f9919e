"""Functions of one place of the scores, as flex attention takes them: their operators, run for all places at once.

before  eq = aten.eq.Tensor(aten.index(ids, [q]), aten.index(ids, [kv]))      # q, kv: integers without dims
after   the same, with q of [1, 1, S, 1] and kv of [1, 1, 1, S]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.errors import NoRule, where
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, is_tensor, value_of
from cpcompile.rules.pointwise import UNTAGGED

aten = torch.ops.aten

# What they create has the dims that they name, whatever the dims of the operand.
_CREATIONS = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}


def at_all_places(before: fx.Node, body: fx.GraphModule, inputs: Sequence[fx.Node], num_places: int) -> fx.Node:
    """Return what `body` computes for all places; the first `num_places` inputs differ from place to place.

    Those have the four dims of the scores, each perhaps of size 1; the others are captured tensors.

    Raises:
        NoRule: an operator is neither pointwise nor an index into a captured tensor.
    """
    return Places(before, body).run(inputs, num_places)


class Places:
    """Copies the nodes of one function into the graph of an attention."""

    def __init__(self, before: fx.Node, body: fx.GraphModule) -> None:
        self.before, self.body = before, body
        self.copies: dict[fx.Node, fx.Node] = {}
        self.differing: set[fx.Node] = set()  # copies whose value differs from place to place
        self.indexed: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}  # rows that a later index picks from

    def run(self, inputs: Sequence[fx.Node], num_places: int) -> fx.Node:
        """Copy all nodes; return the result."""
        self.differing.update(inputs[:num_places])
        given = iter(inputs)
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                self.copies[node] = next(given)
            elif node.op == "get_attr":
                self.copies[node] = self.constant(node)
            elif node.op == "call_function":
                self.call(node)
        (result,) = self.body.graph.output_node().all_input_nodes
        return self.copies[result]

    def constant(self, node: fx.Node) -> fx.Node:
        """Return a tensor that the function holds as a constant of the outer graph."""
        gm = self.before.graph.owning_module
        assert gm is not None
        name = next(n for i in range(len(gm._buffers) + 1) if not hasattr(gm, n := f"constant_of_places_{i}"))
        gm.register_buffer(name, getattr(self.body, str(node.target)), persistent=False)
        with self.before.graph.inserting_before(self.before):
            copy = self.before.graph.get_attr(name)
        copy.meta.update(node.meta)
        return copy

    def call(self, node: fx.Node) -> None:
        """Copy a call."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
            raise self.unknown(node)
        indexed = self.indexed_rows(node)
        if indexed is not None:
            source, indices = indexed
            if len(indices) < value_of(source).dim():
                self.indexed[node] = indexed
                return
            self.copy(node, (source, indices), {})
            self.differing.add(self.copies[node])
            return
        operands = [n for n in node.all_input_nodes if is_tensor(n)]
        if any(n in self.indexed for n in operands):
            raise self.unknown(node)
        differ = any(self.copies[n] in self.differing for n in operands)
        if differ and target not in _CREATIONS:
            if not is_pointwise(target):
                raise self.unknown(node)
            self.copy(node, *fx.map_arg((node.args, node.kwargs), self.at_places))
            self.differing.add(self.copies[node])
        else:
            self.copy(node, *fx.map_arg((node.args, node.kwargs), self.copies.__getitem__))

    def indexed_rows(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]] | None:
        """Return (captured tensor, indices so far) of an index that differs from place to place."""
        if node.target is not aten.index.Tensor:
            return None
        inner, indices = Call.of(node)["self"], list(Call.of(node)["indices"])
        if None in indices or any(i in self.indexed for i in indices):
            raise self.unknown(node)
        source, earlier = self.indexed.get(inner) or (self.copies[inner], [])
        copies = [*earlier, *(self.copies[i] for i in indices)]
        if source in self.differing:
            raise self.unknown(node)
        return (source, copies) if any(i in self.differing for i in copies) else None

    def at_places(self, node: fx.Node) -> fx.Node:
        """Return an operand with the dims of the scores: numbers without dims would be promoted by other rules."""
        copy = self.copies[node]
        if copy in self.differing or not is_tensor(copy):
            return copy
        if value_of(copy).dim():
            raise self.unknown(node)
        return insert_call(self.before, aten.view.default, copy, [1, 1, 1, 1])

    def copy(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Emit the call of `node` with other arguments, under the user's line of `node`."""
        assert callable(node.target)
        with value_of(node).fake_mode if is_tensor(node) else torch.no_grad():
            copy = insert_call(self.before, node.target, *args, **kwargs)
        copy.meta["stack_trace"] = node.meta.get("stack_trace") or self.before.meta.get("stack_trace")
        self.copies[node] = copy

    def unknown(self, node: fx.Node) -> NoRule:
        """Return the error for an operator that does not run for all places at once."""
        return NoRule(
            f"flex_attention: {node.target} in a score_mod or mask_mod is neither pointwise nor an index into a captured "
            f"tensor.\n\n{where(node)}\n\nWrite the function with pointwise operators and indices only."
        )


def is_pointwise(target: torch._ops.OpOverload) -> bool:
    """Tell whether an operator computes each element from the elements at its place, without drawing numbers."""
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    return (torch.Tag.pointwise in target.tags or target in UNTAGGED) and not is_random
