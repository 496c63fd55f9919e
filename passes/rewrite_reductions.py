"""Rewrite reductions: a mean over the tokens becomes the local sum over the count of all ranks.

before  loss = aten.cross_entropy_loss(logits, labels)                      # Partial(sum), in name only
after   total = aten.cross_entropy_loss(logits, labels, None, SUM)          # Partial(sum)
        count = cp.all_reduce(aten.sum(aten.ne(labels, -100)))              # the same on every rank, also where none counts
        loss = aten.div(total, count)                                       # Partial(sum)
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_call, insert_copy, replace_uses
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import PARTIAL, Placement, Sharded
from cpcompile.ir.plan import Lengths, Plan
from cpcompile.rules.reduction import reduced_dims

aten, cp = torch.ops.aten, torch.ops.cpcompile
_MEAN, _SUM = 1, 2  # at::Reduction

Insert = Callable[..., fx.Node]


def rewrite_reductions(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many means were rewritten.

    Needs: placements (`place_tokens`); a mean over tokens is `Partial` in name only.
    Gives: a true addend of every rank wherever a value is `Partial`.
    """
    count = 0
    for node in list(gm.graph.nodes):
        rewrite = MEANS.get(node.target) if node.op == "call_function" else None
        if rewrite is None or annotation(node).placement != PARTIAL:
            continue
        call = Call.of(node)
        if "reduction" in call and call["reduction"] != _MEAN:
            continue
        result = rewrite(call, inserter(node), plan)
        replace_uses(node, result)
        gm.graph.erase_node(node)
        count += 1
    return count


def inserter(before: fx.Node) -> Insert:
    """Return a function that inserts a call as a part of what the node `before` computes."""

    def insert(target: Any, *args: Any, placement: Placement = PARTIAL, **kwargs: Any) -> fx.Node:
        node = insert_call(before, target, *args, **kwargs)
        annotate(node, placement=placement)
        return node

    return insert


def mean_of_loss(call: Call, insert: Insert, plan: Plan) -> fx.Node:
    """cross_entropy_loss and nll_loss: the sum of the losses over the sum of the weights of the labels that count."""
    args, kwargs = call.rebound({"reduction": _SUM})
    total = insert(call.target, *args, **kwargs)
    target, weight = call["target"], call["weight"]
    if call.tensor("target").is_floating_point():  # probabilities: no label is ignored, every row counts
        rows = set(range(target.meta["val"].dim())) - {1}
        return insert(aten.div.Tensor, total, whole_count(insert, target, rows))
    at = placement_of(target)
    counts = insert(aten.ne.Scalar, target, call["ignore_index"], placement=at)
    if weight is not None:
        safe = insert(aten.mul.Tensor, target, counts, placement=at)
        weights = insert(aten.index.Tensor, weight, [safe], placement=at)
        counts = insert(aten.mul.Tensor, weights, counts, placement=at)
    local = insert(aten.sum.default, counts)
    with call.node.graph.inserting_before(call.node):
        arguments = (local, plan.world_size, plan.group)
        count = insert_copy(call.node.graph, cp.all_reduce.default, arguments, local)
    return insert(aten.div.Tensor, total, count)


def mean_of_tensor(call: Call, insert: Insert, plan: Plan) -> fx.Node:
    """mean: the local sum over the number of elements of the whole tensor."""
    dtype = {} if call["dtype"] is None else {"dtype": call["dtype"]}
    if "dim" in call:
        total = insert(aten.sum.dim_IntList, call["self"], call["dim"], call["keepdim"], **dtype)
    else:
        total = insert(aten.sum.default, call["self"], **dtype)
    return insert(aten.div.Tensor, total, whole_count(insert, call["self"], reduced_dims(call)))


def whole_count(insert: Insert, node: fx.Node, dims: set[int]) -> fx.Node | int:
    """Return the product of the sizes that `dims` have in the whole tensor, of which `node` holds the local tokens."""
    assert node.graph.owning_module is not None
    placement = placement_of(node)
    product: fx.Node | int = 1
    for dim in sorted(dims):
        size: fx.Node | int = node.meta["val"].shape[dim]
        if not isinstance(size, int):
            size = insert(aten.sym_size.int, node, dim)
            if isinstance(placement, Sharded) and dim == placement.dim:
                lengths = Lengths.of(node.graph.owning_module, placement.sequence)
                outer = insert(operator.floordiv, size, lengths.local)
                with node.graph.inserting_after(outer):
                    tokens = lengths.count(node.graph.owning_module, placement)
                size = insert(operator.mul, outer, tokens)
        both_known = isinstance(product, int) and isinstance(size, int)
        product = product * size if both_known else insert(operator.mul, product, size)  # type: ignore[operator]
    return product


MEANS: dict[Any, Callable[[Call, Insert, Plan], fx.Node]] = {
    aten.cross_entropy_loss.default: mean_of_loss,
    aten.nll_loss.default: mean_of_loss,
    aten.nll_loss2d.default: mean_of_loss,
    aten.nll_loss_nd.default: mean_of_loss,
    aten.mean.default: mean_of_tensor,
    aten.mean.dim: mean_of_tensor,
}
