"""The scores of attention written out, from the product of queries and keys to the softmax."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.nodes import is_conversion, same_shape
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
_SELECTIONS = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True, slots=True)
class Masking:
    """A mask that is added to the scores (`fill` is None), or a boolean that fills scores where it is `where`."""

    tensor: fx.Node
    fill: float | None = None
    where: bool = True


@dataclass(frozen=True, slots=True)
class Scores:
    """What is applied to a product of queries and keys: scale, then softcap, then masks."""

    nodes: tuple[fx.Node, ...]
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[Masking, ...] = ()

    @property
    def product(self) -> fx.Node:
        """The product of queries and keys."""
        return self.nodes[0]


def read_scores(node: Any, reader: Reader) -> Scores | None:
    """Read back from a value that goes into a softmax to the product of queries and keys, as long as nothing else uses it."""
    if not is_tensor(node) or len(node.users) != 1:
        return None
    if node.target in PRODUCTS:
        return Scores((node,))
    if node.target is aten.add.Tensor:
        return read_addition(node, reader)
    if node.target in _FILLS | _SELECTIONS:
        return read_fill(node, reader)
    if is_conversion(node) or node.target in {aten.tanh.default} | _MULTIPLICATIONS | _DIVISIONS:
        scores = read_scores(node.args[0], reader)
        return None if scores is None else applied(scores, node, reader)
    return None


def applied(scores: Scores, node: fx.Node, reader: Reader) -> Scores | None:
    """Return the scores after `node`, a conversion, a constant factor or a tanh."""
    scores = replace(scores, nodes=(*scores.nodes, node))
    if is_conversion(node):
        return scores
    if scores.masks:
        return None
    if node.target is aten.tanh.default:
        return None if scores.softcap else replace(scores, softcap=1.0)
    factor = constant(reader, node.args[1])
    if factor is None or factor <= 0:
        return None
    factor = 1 / factor if node.target in _DIVISIONS else factor
    # c * tanh(s * x) is the softcap c of the scores (c * s) * x.
    return replace(scores, scale=scores.scale * factor, softcap=scores.softcap * factor)


def read_addition(node: fx.Node, reader: Reader) -> Scores | None:
    """Read scores to which a mask is added, on either side."""
    call = Call.of(node)
    for inner, mask in itertools.permutations((call["self"], call["other"])):
        scores = read_scores(inner, reader) if is_tensor(mask) and call["alpha"] == 1 else None
        if scores is not None:
            return masked(scores, node, Masking(mask))
    return None


def read_fill(node: fx.Node, reader: Reader) -> Scores | None:
    """Read scores that are replaced by a constant where a boolean says so."""
    call = Call.of(node)
    if node.target in _FILLS:
        sides = [(call["self"], call["value"], Masking(call["mask"]))]
    else:
        condition = call["condition"]
        sides = [
            (call["self"], call["other"], Masking(condition, where=False)),
            (call["other"], call["self"], Masking(condition)),
        ]
    for inner, value, masking in sides:
        fill = constant(reader, value)
        scores = read_scores(inner, reader) if fill is not None else None
        if scores is not None:
            return masked(scores, node, replace(masking, fill=fill))
    return None


def masked(scores: Scores, node: fx.Node, masking: Masking) -> Scores | None:
    """Return the scores after a mask, unless the mask has dims that they do not have."""
    if not same_shape(value_of(node).shape, value_of(scores.product).shape):
        return None
    return replace(scores, nodes=(*scores.nodes, node), masks=(*scores.masks, masking))
