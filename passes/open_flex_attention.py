"""Open flex attention: each one becomes its formula, with its functions of one place run for all places at once.

before  out = flex_attention(q, k, v, score_mod, (..., mask_mod), 0.25, ...)[0]
after   scores = aten.where(kv <= q, aten.matmul(q, k^T) * 0.25, -inf)
        out = aten.matmul(aten._safe_softmax(scores, -1), v)

`find_attention` and `lift_masks` then see what the functions mean. What they do not know stays written out.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
from torch import fx

from cpcompile.analysis.masks.expression import TRUE
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.block_lists import BlockLists, list_the_mask, visible
from cpcompile.analysis.patterns.formula import coordinate, products, weighted
from cpcompile.analysis.patterns.nodes import erase_with_users, is_used
from cpcompile.analysis.patterns.place_by_place import at_all_places
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten


class Flex(NamedTuple):
    """The arguments of the operator."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    score_mod: fx.Node
    block_mask: tuple[Any, ...]
    scale: float
    kernel_options: Any
    score_tensors: tuple[Any, ...] = ()
    mask_tensors: tuple[Any, ...] = ()


def open_flex_attention(gm: fx.GraphModule) -> int:
    """Return how many flex attentions were opened.

    Needs: no operator writes (`functionalise_writes`).
    Gives: the formula of each flex attention: products, masks and a softmax.

    Raises:
        NoRule: a score_mod or mask_mod has an operator that is neither pointwise nor an index.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.flex_attention)
    for node in nodes:
        write(gm, node, Flex(*node.args, **node.kwargs))
    return len(nodes)


def write(gm: fx.GraphModule, node: fx.Node, flex: Flex) -> None:
    """Replace one flex attention, and each of its results that is used."""
    scores = written_scores(gm, node, flex)
    results = {
        0: lambda: weighted(node, scores, flex.v, value_of(flex.q).dtype),
        1: lambda: in_bits(node, insert_call(node, aten.logsumexp.default, scores, [-1])),
        2: lambda: in_bits(
            node, insert_call(node, aten.detach.default, insert_call(node, aten.amax.default, scores, [-1]))
        ),
    }
    for item in list(node.users):
        source, i = item.args
        assert item.target is operator.getitem and source is node and isinstance(i, int), item.format_node()
        if is_used(item):
            replace_uses(item, results[i]())
        erase_with_users(item)
    gm.graph.erase_node(node)


def written_scores(gm: fx.GraphModule, node: fx.Node, flex: Flex) -> fx.Node:
    """Return the scores, -inf where the mask hides them."""
    scores = products(node, flex.q, flex.k, flex.scale)
    sizes = [(flex.q, 0), (flex.q, 1), (flex.q, 2), (flex.k, 2)]
    shapes = [[-1 if dim == i else 1 for dim in range(4)] for i in range(4)]
    places = [coordinate(node, *size, shape) for size, shape in zip(sizes, shapes, strict=True)]
    score_mod, mask_mod = (getattr(gm, str(body.target)) for body in (flex.score_mod, flex.block_mask[-1]))
    mask = at_all_places(node, mask_mod, [*places, *flex.mask_tensors], num_places=4)
    lists = BlockLists.of(flex.block_mask)
    if lists is not None and not list_the_mask(lists, mask_mod, flex.mask_tensors, value_of(flex.q), value_of(flex.k)):
        mask = visible(node, lists, mask, places, flex.k)
    scores = at_all_places(node, score_mod, [scores, *places, *flex.score_tensors], num_places=5)
    if Reader(gm).read(mask) == TRUE:
        return scores
    return insert_call(node, aten.where.ScalarOther, mask, scores, float("-inf"))


def in_bits(before: fx.Node, statistic: fx.Node) -> fx.Node:
    """Return a statistic of the scores over log(2), as the operator does."""
    return insert_call(before, aten.div.Tensor, statistic, math.log(2))
