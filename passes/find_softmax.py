"""Find softmax: exponentials over their sum become one softmax.

before  e = aten.exp(aten.sub(x, aten.amax(x, [-1], True))); w = aten.div(e, aten.sum(e, [-1], True))
        w = aten.exp(aten.log_softmax(x, -1))
        out = aten.div(aten.matmul(e, v), aten.sum(e, [-1], True))
after   w = aten.softmax(aten.sub(x, aten.amax(x, [-1], True)), -1)
        w = aten.softmax(x, -1)
        out = aten.matmul(aten.softmax(...), v)

Exponentials that are set to 0 are those of minus infinity: `exp(x) * mask`. What is added to the sum of the exponentials of
attention scores is the exponential of one more score, whose weight is dropped: `exp(x) / (1 + sum(exp(x)))`, off by one.
"""

from __future__ import annotations

import math

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.fills import fills_of
from cpcompile.analysis.patterns.formula import size_of
from cpcompile.analysis.patterns.nodes import same_shape, source, switches_mode, value_numbers
from cpcompile.analysis.patterns.scores import PRODUCTS, ScoreReader
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.expand.default}
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
        above, (below, beside) = Call.of(node)["self"], self._summed(Call.of(node)["other"])
        if below is None or value_of(node).dtype != value_of(below).dtype or switches_mode(below, node):
            return None
        if self._is_same(above, below, node):
            return self._softmax(node, below, beside)
        if above.target in PRODUCTS and self._is_same(source(above), below, node) and not switches_mode(above, node):
            weights = self._softmax(node, below, beside)
            return weights and insert_call(node, above.target, weights, *above.args[1:])
        return None

    def _softmax(self, before: fx.Node, exponentials: fx.Node, beside: fx.Node | float) -> fx.Node | None:
        """Return the softmax of which these are the exponentials, some of them perhaps set to 0, with others `beside` them."""
        if beside == 0:
            logits = self._logits(before, exponentials)
            return logits and insert_call(before, aten.softmax.int, logits, -1)
        unfilled = self._unfilled(exponentials)
        if unfilled is None or ScoreReader(self.reader).read(unshifted(source(unfilled))[0]) is None:
            return None
        # What is taken from the scores and from what is beside them is taken from all logits, which softmax ignores.
        _, of_rows = unshifted(source(unfilled))
        logarithm = math.log(beside) if not isinstance(beside, fx.Node) else logarithm_of(before, beside)
        column, of_column = unshifted(logarithm) if isinstance(logarithm, fx.Node) else (logarithm, None)
        is_shift = of_rows is not None and of_column is not None and self._is_same(of_rows, of_column, before)
        column = column if is_shift else logarithm
        logits = self._logits(before, exponentials, is_shifted=not is_shift)
        if logits is None:
            return None
        weights = insert_call(before, aten.softmax.int, with_column(before, logits, column), -1)
        return insert_call(before, aten.slice.Tensor, weights, -1, 0, -1)

    def _unfilled(self, exponentials: fx.Node) -> fx.Node | None:
        """Return the exponentials before some were set to 0."""
        if is_exponential(exponentials):
            return exponentials
        fills = (fill.inner for fill in fills_of(exponentials, self.reader) if fill.value == 0)
        return next((inner for inner in fills if is_exponential(inner)), None)

    def _logits(self, before: fx.Node, exponentials: fx.Node, is_shifted: bool = True) -> fx.Node | None:
        """Return the numbers of which these are the exponentials, minus infinity where they are set to 0.

        If they are not to be shifted, what is taken from each row is left out.
        """

        def of(exponential: fx.Node) -> fx.Node:
            logits = source(exponential) if is_shifted else unshifted(source(exponential))[0]
            assert isinstance(logits, fx.Node)
            return logits

        if is_exponential(exponentials):
            return of(exponentials)
        for fill in fills_of(exponentials, self.reader):
            is_whole = same_shape(value_of(fill.inner).shape, value_of(exponentials).shape)
            if fill.value == 0 and is_exponential(fill.inner) and is_whole and not switches_mode(fill.inner, before):
                condition = fill.condition
                if value_of(condition).dtype is not torch.bool:
                    condition = insert_call(before, aten.ne.Scalar, condition, 0)
                hidden = condition if fill.where else insert_call(before, aten.logical_not.default, condition)
                return insert_call(before, aten.masked_fill.Scalar, of(fill.inner), hidden, float("-inf"))
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

    def _summed(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | float]:
        """Return what a node sums along its last dim, and a positive number or an exponential that it adds to the sum, or 0."""
        if node.target is not aten.add.Tensor or Call.of(node)["alpha"] != 1:
            return self._reduced(node, aten.sum.dim_IntList), 0
        call = Call.of(node)
        for sum_, beside in ((call["self"], call["other"]), (call["other"], call["self"])):
            below = self._reduced(sum_, aten.sum.dim_IntList) if is_tensor(sum_) else None
            number = constant(self.reader, beside)
            if below is not None and number is not None and number > 0:
                return below, number
            if below is not None and is_tensor(beside) and is_exponential(unviewed(beside)):
                return (None, 0) if switches_mode(unviewed(beside), node) else (below, beside)
        return None, 0

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


def unshifted(logits: fx.Node) -> tuple[fx.Node | float, fx.Node | None]:
    """Return x and y of `x - y`, where y is one number for each row, or of `-y` with x = 0; else all and None."""
    if logits.target is aten.neg.default and is_of_rows(source(logits)):
        return 0.0, source(logits)
    if logits.target is aten.sub.Tensor and is_tensor(logits.args[1]):
        call = Call.of(logits)
        is_number = is_of_rows(call["other"]) and call["alpha"] == 1
        return (call["self"], call["other"]) if is_number else (logits, None)
    return logits, None


def unviewed(node: fx.Node) -> fx.Node:
    """Return what a node is a view of."""
    while node.target in VIEWS:
        node = source(node)
    return node


def logarithm_of(before: fx.Node, exponential: fx.Node) -> fx.Node:
    """Return the numbers of which these are the exponentials, seen as those are."""
    if exponential.target not in VIEWS:
        return source(exponential)
    inner = logarithm_of(before, source(exponential))
    return insert_call(before, exponential.target, inner, *exponential.args[1:])


def is_of_rows(node: fx.Node) -> bool:
    """Tell whether a value has one number for each row at most."""
    shape = value_of(node).shape
    return not shape or statically_known_true(shape[-1] == 1)


def with_column(before: fx.Node, logits: fx.Node, column: fx.Node | float) -> fx.Node:
    """Return logits with one more behind those of each row."""
    if not isinstance(column, fx.Node):
        return insert_call(before, aten.constant_pad_nd.default, logits, [0, 1], column)
    rows = [size_of(before, logits, dim) for dim in range(value_of(logits).dim() - 1)]
    return insert_call(
        before, aten.cat.default, [logits, insert_call(before, aten.expand.default, column, [*rows, 1])], -1
    )


def is_exponential(node: fx.Node) -> bool:
    """Tell whether a node is an exponential of floating-point numbers, of which there is a softmax."""
    return node.target is aten.exp.default and value_of(source(node)).dtype == value_of(node).dtype
