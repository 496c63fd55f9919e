"""The weights of attention written out, from the softmax to the product with the values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.fills import Fill, fills_of
from cpcompile.analysis.patterns.nodes import is_conversion, same_shape
from cpcompile.analysis.patterns.scores import PRODUCTS
from cpcompile.analysis.patterns.sinks import SinkColumn, drops_column
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Weights:
    """What is applied to the weights of a softmax until they are multiplied with the values, by the last node.

    `zeroed`: fills with 0. Where the weights of a whole row are undefined, 0 is what the operator means anyway.
    """

    nodes: tuple[fx.Node, ...]
    zeroed: tuple[Fill, ...] = ()

    @property
    def product(self) -> fx.Node:
        """The product of weights and values."""
        return self.nodes[-1]


def read_weights(softmax: fx.Node, reader: Reader, sinks: SinkColumn | None) -> Weights | None:
    """Read on from a softmax to the one product with values that its weights go into.

    With sinks, their column is dropped first.
    """
    weights = Weights((softmax,))
    if sinks is not None:
        dropping = [user for user in softmax.users if drops_column(user, softmax, sinks.is_first)]
        if len(dropping) != 1:
            return None
        weights = Weights((softmax, dropping[0]))
    while weights.product.target not in PRODUCTS:
        found = [step for user in weights.product.users for step in steps(user, weights, reader)]
        if len(found) != 1:
            return None
        (weights,) = found
    return weights


def steps(node: fx.Node, weights: Weights, reader: Reader) -> Iterator[Weights]:
    """Yield the weights after `node`, which uses them, if that leaves weights, or is their product with values."""
    before, after = weights.product, replace(weights, nodes=(*weights.nodes, node))
    if node.target in PRODUCTS:
        if node.args[0] is before is not node.args[1]:
            yield after
    elif is_conversion(node) or node.target is aten.dropout.default:
        yield after
    elif node.target is aten.nan_to_num.default:
        if not Call.of(node)["nan"]:
            yield after
    elif is_tensor(node) and same_shape(value_of(node).shape, value_of(before).shape):
        for fill in fills_of(node, reader):
            if fill.inner is before and fill.value == 0:
                is_undefined = fill.condition.target is aten.isnan.default and fill.condition.args[0] is before
                yield after if is_undefined and fill.where else replace(after, zeroed=(*weights.zeroed, fill))


def dropout_of(weights: Weights) -> float | None:
    """Return the probability of a weight being dropped, or None where two dropouts do it."""
    calls = [Call.of(node) for node in weights.nodes if node.target is aten.dropout.default]
    rates = [float(call["p"]) for call in calls if call["train"] and call["p"]]
    return sum(rates) if len(rates) < 2 else None
