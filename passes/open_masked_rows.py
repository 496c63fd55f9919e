"""Open masked rows: what a mask picks is computed for all tokens, and what is not picked does not count.

before  loss = aten.cross_entropy_loss(aten.linear(aten.index(h, [mask]), w), aten.index(labels, [mask]))
        y = aten.index_put(x, [mask], images)                                # an image token each
        z = aten.index_put(x, [mask], aten.add(aten.linear(aten.index(x, [mask]), w), images))
after   logits = aten.linear(aten.masked_fill(h, ~mask, 0), w)
        loss = aten.cross_entropy_loss(flatten(logits), flatten(aten.where(mask, labels, -100)))
        y = aten.masked_scatter(x, aten.unsqueeze(mask, -1), images)
        more = aten.masked_scatter(zeros, aten.unsqueeze(mask, -1), images)
        z = aten.where(aten.unsqueeze(mask, -1), aten.add(aten.linear(aten.masked_fill(x, ~mask, 0), w), more), x)

How many rows a mask picks only running tells; how many tokens there are is known. Rows that are not picked are computed from
zeros, by operators that are finite there, so that nothing of them reaches a gradient.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

from cpcompile.analysis.patterns.masked_rows import (
    LOSSES_OF_LABELS,
    LOSSES_OF_PAIRS,
    NONE,
    SAME,
    TOTALS,
    Rows,
    find_rows,
    mask_of,
)
from cpcompile.analysis.patterns.nodes import same_shape
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten
_MEAN = 1  # at::Reduction


def open_masked_rows(gm: fx.GraphModule) -> int:
    """Return how many ends of masked rows were opened.

    Needs: operators that write nothing in place (`functionalise_writes`).
    Gives: losses of rows that a mask picks, and values in their places, as operators on all rows.
    """
    found = find_rows(gm.graph)
    ends = {end for rows in found for end in rows.ends}
    puts = gm.graph.find_nodes(op="call_function", target=aten.index_put.default)
    count = sum(put_in_order(node) for node in puts if node not in ends)
    return count + sum(Opener(rows).open() for rows in found)


def put_in_order(node: fx.Node) -> bool:
    """Write rows of their own into the places of a mask, one after the other, as `masked_scatter`; tells whether it was done."""
    call, mask = Call.of(node), mask_of(node)
    if mask is None or call["accumulate"] or is_picked(call["values"]):
        return False
    x, values = value_of(call["self"]), value_of(call["values"])
    rest = x.shape[value_of(mask).dim() :]
    if values.dim() != 1 + len(rest) or not same_shape(values.shape[1:], rest) or values.dtype != x.dtype:
        return False
    if statically_known_true(values.shape[0] == 1):  # the same row at each place
        return False
    scattered = insert_call(
        node, aten.masked_scatter.default, call["self"], as_wide(node, mask, x.dim()), call["values"]
    )
    replace_uses(node, scattered)
    node.graph.erase_node(node)
    return True


def is_picked(node: fx.Node) -> bool:
    """Tell whether a node has as many rows as values say."""
    return any(free_unbacked_symbols(size) for size in value_of(node).shape)


def as_wide(before: fx.Node, mask: fx.Node, num_dims: int) -> fx.Node:
    """Return a mask with more dims at its end, `num_dims` in all."""
    for _ in range(num_dims - value_of(mask).dim()):
        mask = insert_call(before, aten.unsqueeze.default, mask, -1)
    return mask


class Opener:
    """Computes for all tokens what is computed from the rows of a mask."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.mask = rows, rows.mask
        self.whole: dict[fx.Node, fx.Node] = {}  # what is computed in the place of rows

    def open(self) -> int:
        """Compute everything for all tokens; returns the number of ends."""
        for node in self.rows.rows:
            self.whole[node] = self.opened(node)
        for end in self.rows.ends:
            replace_uses(end, OPENED[end.target](self, Call.of(end)))
        for node in sorted([*self.rows.sizes, *self.rows.ends, *self.rows.rows], reverse=True):
            node.graph.erase_node(node)
        return len(self.rows.ends)

    def opened(self, node: fx.Node) -> fx.Node:
        """Return what is computed in the place of rows."""
        if node.target is operator.getitem:
            broadcast = Call.of(node.all_input_nodes[0])
            return self.whole[[operand for _, operand in broadcast.operands()][node.args[1]]]  # type: ignore[index]
        call = Call.of(node)
        if node in self.rows.picks:
            x = call["self"]
            hidden = insert_call(node, aten.logical_not.default, as_wide(node, self.mask, value_of(x).dim()))
            return insert_call(node, aten.masked_fill.Scalar, x, hidden, 0)
        changes = {name: self.whole[operand] for name, operand in call.operands() if operand in self.whole}
        like = next(iter(changes.values()))
        changes |= {name: self.in_places(node, x, like) for name, x in call.operands() if x in self.rows.in_order}
        if node.target in SAME:
            return changes["self"]
        if node.target is aten.broadcast_tensors.default:
            return next(iter(changes.values()))  # read by nothing: `getitem` takes its own
        args, kwargs = call.rebound(changes)
        return insert_call(node, call.target, *args, **kwargs)

    def in_places(self, before: fx.Node, values: fx.Node, like: fx.Node) -> fx.Node:
        """Return values that have a row for each that was picked in the places of these, with zeros in the others."""
        zeros = insert_call(before, aten.zeros_like.default, like)
        wide = as_wide(before, self.mask, value_of(like).dim())
        return insert_call(before, aten.masked_scatter.default, zeros, wide, values)

    def flat(self, before: fx.Node, x: fx.Node) -> fx.Node:
        """Return what has the dims of the mask with one dim in their place."""
        rank = value_of(self.mask).dim()
        return x if rank == 1 else insert_call(before, aten.flatten.using_ints, x, 0, rank - 1)

    def loss_of_labels(self, call: Call) -> fx.Node:
        """Return a loss in which labels that were not picked are ignored."""
        end, labels = call.node, self.whole[call["target"]]
        labels = insert_call(end, aten.where.ScalarOther, self.mask, labels, call["ignore_index"])
        operands = {"self": self.flat(end, self.whole[call["self"]]), "target": self.flat(end, labels)}
        args, kwargs = call.rebound(operands)
        return insert_call(end, call.target, *args, **kwargs)

    def loss_of_pairs(self, call: Call) -> fx.Node:
        """Return the total of the losses of the elements that were picked."""
        changes = {name: self.whole[call[name]] for name in ("self", "target")}
        args, kwargs = call.rebound({**changes, "reduction": NONE})
        losses = insert_call(call.node, call.target, *args, **kwargs)
        return self.total(call, losses, call["reduction"] == _MEAN)

    def total_of_rows(self, call: Call) -> fx.Node:
        """Return a sum or a mean of the elements that were picked."""
        return self.total(call, self.whole[call["self"]], call.target is aten.mean.default)

    def total(self, call: Call, x: fx.Node, is_mean: bool) -> fx.Node:
        """Return the sum, or the mean, of the elements that were picked of `x`."""
        end, value = call.node, value_of(x)
        picked = insert_call(end, aten.where.ScalarOther, as_wide(end, self.mask, value.dim()), x, 0)
        total = insert_call(end, aten.sum.default, picked)
        if not is_mean:
            return total
        count = insert_call(end, aten.sum.default, self.mask)
        width = math.prod(value.shape[value_of(self.mask).dim() :])
        return insert_call(end, aten.div.Tensor, total, insert_call(end, aten.mul.Tensor, count, width))

    def put(self, call: Call) -> fx.Node:
        """Return rows put where they were picked."""
        wide = as_wide(call.node, self.mask, call.result.dim())
        return insert_call(call.node, aten.where.self, wide, self.whole[call["values"]], call["self"])


OPENED: dict[Any, Callable[[Opener, Call], fx.Node]] = {
    **dict.fromkeys(LOSSES_OF_LABELS, Opener.loss_of_labels),
    **dict.fromkeys(LOSSES_OF_PAIRS, Opener.loss_of_pairs),
    **dict.fromkeys(TOTALS, Opener.total_of_rows),
    aten.index_put.default: Opener.put,
}
