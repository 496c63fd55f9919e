"""Find softmax: exponentials over their sum become one softmax.

before  e = aten.exp(aten.sub(x, aten.amax(x, [-1], True))); w = aten.div(e, aten.sum(e, [-1], True))
        w = aten.exp(aten.log_softmax(x, -1))
        out = aten.div(aten.matmul(e, v), aten.sum(e, [-1], True))
after   w = aten.softmax(aten.sub(x, aten.amax(x, [-1], True)), -1)
        w = aten.softmax(x, -1)
        out = aten.matmul(aten.softmax(...), v)

Exponentials that are set to 0 are those of minus infinity: `exp(x) * mask`.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.fills import fills_of
from cpcompile.analysis.patterns.nodes import same_shape, source, switches_mode, value_numbers
from cpcompile.analysis.patterns.scores import PRODUCTS
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_LOG_SOFTMAX = {aten.log_softmax.int, aten._log_softmax.default}


def find_softmax(gm: fx.GraphModule) -> int:
    """Return how many softmaxes over the last dim were found.

    Needs: no operator writes (`functionalise_writes`).
    Gives: `softmax` in place of exponentials over their sum, for `find_attention`.
    """
    if not gm.graph.find_nodes(op="call_function", target=aten.exp.default):
        return 0
    finder, count = Finder(gm), 0
    for node in list(gm.graph.nodes):
        new = finder.softmax(node)
        if new is not None:
            replace_uses(node, new)
            count += 1
    return count


class Finder:
    """Finds softmaxes in one graph, in which values that are computed twice are one value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.reader = Reader(gm)
        self.numbers = value_numbers(gm.graph)

    def softmax(self, node: fx.Node) -> fx.Node | None:
        """Return the softmax that a node computes, or that it divides by its sum, inserted before it; None for any other node."""
        if node.target is aten.exp.default:
            return self._of_logarithm(node)
        if node.target is not aten.div.Tensor or not is_tensor(node.args[1]):
            return None
        above, below = Call.of(node)["self"], self._summed(Call.of(node)["other"])
        if below is None or value_of(node).dtype != value_of(below).dtype or switches_mode(below, node):
            return None
        if self._is_same(above, below, node):
            return self._softmax(node, below)
        if above.target in PRODUCTS and self._is_same(source(above), below, node) and not switches_mode(above, node):
            weights = self._softmax(node, below)
            return weights and insert_call(node, above.target, weights, *above.args[1:])
        return None

    def _softmax(self, before: fx.Node, exponentials: fx.Node) -> fx.Node | None:
        """Return the softmax of which these are the exponentials, some of them perhaps set to 0."""
        if is_exponential(exponentials):
            return insert_call(before, aten.softmax.int, exponentials.args[0], -1)
        for fill in fills_of(exponentials, self.reader):
            is_whole = same_shape(value_of(fill.inner).shape, value_of(exponentials).shape)
            if fill.value == 0 and is_exponential(fill.inner) and is_whole and not switches_mode(fill.inner, before):
                condition = fill.condition
                if value_of(condition).dtype is not torch.bool:
                    condition = insert_call(before, aten.ne.Scalar, condition, 0)
                hidden = condition if fill.where else insert_call(before, aten.logical_not.default, condition)
                logits = insert_call(before, aten.masked_fill.Scalar, fill.inner.args[0], hidden, float("-inf"))
                return insert_call(before, aten.softmax.int, logits, -1)
        return None

    def _of_logarithm(self, node: fx.Node) -> fx.Node | None:
        """Return the softmax of which a node takes the exponential of the logarithm."""
        (logarithm,) = node.all_input_nodes
        if switches_mode(logarithm, node):
            return None
        if logarithm.target in _LOG_SOFTMAX:
            call = Call.of(logarithm)
            is_last = call["dim"] in (-1, value_of(node).dim() - 1)
            is_kept = value_of(call["self"]).dtype == value_of(node).dtype
            return insert_call(node, aten.softmax.int, call["self"], -1) if is_last and is_kept else None
        if logarithm.target is aten.sub.Tensor and is_tensor(logarithm.args[1]):
            call = Call.of(logarithm)
            of = self._reduced(call["other"], aten.logsumexp.default)
            is_one_mode = of is not None and not switches_mode(call["other"], node)
            if of is not None and is_one_mode and call["alpha"] == 1 and self._is_same(call["self"], of, node):
                return insert_call(node, aten.softmax.int, of, -1)
        return None

    def _summed(self, node: fx.Node) -> fx.Node | None:
        return self._reduced(node, aten.sum.dim_IntList)

    def _reduced(self, node: fx.Node, target: torch._ops.OpOverload) -> fx.Node | None:
        """Return what a node reduces along its last dim, which it keeps with size 1."""
        shape = value_of(node).shape
        if node.target is aten.unsqueeze.default and node.args[1] in (-1, len(shape) - 1):
            node = node.args[0]  # type: ignore[assignment]
        if node.target is not target:
            return None
        call = Call.of(node)
        of: fx.Node = call["self"]
        dims = [dim % value_of(of).dim() for dim in call["dim"] or ()]
        is_kept = len(shape) == value_of(of).dim() and statically_known_true(shape[-1] == 1)
        return of if dims == [value_of(of).dim() - 1] and is_kept else None

    def _is_same(self, a: fx.Node, b: fx.Node, node: fx.Node) -> bool:
        """Tell whether two values are one, and were computed under the mode of `node` if they were computed twice."""
        is_one = self.numbers.get(a, -1) == self.numbers.get(b, -2)
        return a is b or (is_one and not any(switches_mode(x, node) for x in (a, b)))


def is_exponential(node: fx.Node) -> bool:
    """Tell whether a node is an exponential of floating-point numbers, of which there is a softmax."""
    return node.target is aten.exp.default and value_of(source(node)).dtype == value_of(node).dtype
