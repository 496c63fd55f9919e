"""The scores of attention written out, from the product of queries and keys to the softmax."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.fills import fills_of
from cpcompile.analysis.patterns.nodes import is_conversion, same_shape, source
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_MULTIPLICATIONS = {aten.mul.Tensor, aten.mul.Scalar}
_DIVISIONS = {aten.div.Tensor, aten.div.Scalar}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_MAXIMA = {aten.amax.default, aten.max.dim, aten.max.default, aten.logsumexp.default}
# Scores are a few steps from their softmax; what is further is another thing, such as a sum of many layers.
FURTHEST = 100
PRODUCTS = {aten.matmul.default, aten.bmm.default}


@dataclass(frozen=True, slots=True)
class Masking:
    """A mask that is added to the scores, `factor` times (`fill` is None), or a condition that fills them where it is `where`."""

    tensor: fx.Node
    fill: float | None = None
    where: bool = True
    factor: float = 1.0

    def times(self, factor: float) -> Masking:
        """Return what is left of it after the scores are multiplied with a positive number."""
        return replace(self, fill=None if self.fill is None else self.fill * factor, factor=self.factor * factor)


@dataclass(frozen=True, slots=True)
class Temperature:
    """A factor of the scores that is the same along their keys, and so one of the queries; or along their queries."""

    tensor: fx.Node
    is_divisor: bool
    is_of_queries: bool


@dataclass(frozen=True, slots=True)
class Scores:
    """What is applied to a product of queries and keys: temperatures and scale, then softcap, then masks.

    `is_shifted`: a number is subtracted from each row, which softmax ignores.
    """

    nodes: tuple[fx.Node, ...]
    temperatures: tuple[Temperature, ...] = ()
    scale: float = 1.0
    softcap: float = 0.0
    masks: tuple[Masking, ...] = ()
    is_shifted: bool = False

    @property
    def product(self) -> fx.Node:
        """The product of queries and keys."""
        return self.nodes[0]


class ScoreReader:
    """Reads back from a value that goes into a softmax to the product of queries and keys; each node once."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.known: dict[fx.Node, Scores | None] = {}

    def read(self, node: Any) -> Scores | None:
        """Return the scores that a node holds, or None."""
        if not is_tensor(node) or (node not in self.known and len(self.known) == FURTHEST):
            return None
        if node not in self.known:
            self.known[node] = None
            self.known[node] = next(self._readings(node), None)
        return self.known[node]

    def _readings(self, node: fx.Node) -> Iterator[Scores]:
        if node.target in PRODUCTS:
            yield Scores((node,))
        elif is_conversion(node) or node.target is aten.tanh.default:
            yield from self._applied(node)
        elif node.target in _SUMS:
            yield from self._added(node)
        else:
            if node.target in _MULTIPLICATIONS | _DIVISIONS:
                yield from self._applied(node)
                yield from self._tempered(node)
            yield from self._filled(node)

    def _applied(self, node: fx.Node) -> Iterator[Scores]:
        """Read a conversion, a constant factor or a tanh of scores."""
        scores = self.read(node.args[0])
        if scores is None:
            return
        scores = replace(scores, nodes=(*scores.nodes, node))
        if is_conversion(node):
            yield scores
        elif node.target is aten.tanh.default:
            if not (scores.softcap or scores.masks or scores.is_shifted):
                yield replace(scores, softcap=1.0)
        else:
            factor = constant(self.reader, node.args[1])
            if factor is not None and factor > 0:
                factor = 1 / factor if node.target in _DIVISIONS else factor
                # c * tanh(s * x) is the softcap c of the scores (c * s) * x.
                masks = tuple(masking.times(factor) for masking in scores.masks)
                yield replace(scores, scale=scores.scale * factor, softcap=scores.softcap * factor, masks=masks)

    def _tempered(self, node: fx.Node) -> Iterator[Scores]:
        """Read a product of scores that nothing hides yet, on either side, and a factor of their rows or columns."""
        sides = [node.args[:2], node.args[1::-1]] if node.target in _MULTIPLICATIONS else [node.args[:2]]
        for inner, factor in sides:
            if not isinstance(factor, fx.Node) or not is_tensor(factor) or constant(self.reader, factor) is not None:
                continue
            scores = self.read(inner)
            is_plain = scores is not None and not (scores.softcap or scores.masks or scores.is_shifted)
            if scores is None or not is_plain or not is_of_same(node, factor, scores.product):
                continue
            for dim in (-1, -2):
                if len(value_of(factor).shape) < -dim or statically_known_true(value_of(factor).shape[dim] == 1):
                    found = Temperature(factor, node.target in _DIVISIONS, dim == -1)
                    nodes = (*scores.nodes, node)
                    yield replace(scores, nodes=nodes, temperatures=(*scores.temperatures, found))
                    break

    def _added(self, node: fx.Node) -> Iterator[Scores]:
        """Read scores to which a mask is added on either side, or from which it or a number for each row is subtracted."""
        call, is_sum = Call.of(node), node.target is aten.add.Tensor
        sides = [(call["self"], call["other"], 1.0 if is_sum else -1.0), (call["other"], call["self"], 1.0)]
        for inner, mask, factor in sides if is_sum else sides[:1]:
            scores = self.read(inner) if is_tensor(mask) and call["alpha"] == 1 else None
            if scores is not None and self._is_of_rows(mask, scores):
                yield replace(scores, nodes=(*scores.nodes, node), is_shifted=True)
            elif scores is not None:
                yield from masked(scores, node, Masking(mask, factor=factor))

    def _filled(self, node: fx.Node) -> Iterator[Scores]:
        """Read scores that are replaced by a constant where a condition says so."""
        for fill in fills_of(node, self.reader):
            scores = self.read(fill.inner)
            if scores is not None:
                yield from masked(scores, node, Masking(fill.condition, fill.value, fill.where))

    def _is_of_rows(self, number: fx.Node, scores: Scores) -> bool:
        """Tell whether a value is one for each row, and the largest of these scores: one that is larger may round them away."""
        of = self.read(maximum_of_rows(number))
        return of is not None and of.product is scores.product


def is_of_same(node: fx.Node, factor: fx.Node, product: fx.Node) -> bool:
    """Tell whether a product of scores and a factor has their shape, and all three the same dtype."""
    dtypes = {value_of(x).dtype for x in (node, factor, product)}
    return len(dtypes) == 1 and same_shape(value_of(node).shape, value_of(product).shape)


def maximum_of_rows(number: fx.Node) -> fx.Node | None:
    """Return the tensor of which a value holds the largest numbers, or their logsumexp, if it is one for each row at most."""
    size = value_of(number).shape
    while number.target in (aten.detach.default, aten.unsqueeze.default, operator.getitem) or is_conversion(number):
        number = source(number)
    is_of_rows = not size or statically_known_true(size[-1] == 1)
    return source(number) if is_of_rows and number.target in _MAXIMA else None


def masked(scores: Scores, node: fx.Node, masking: Masking) -> Iterator[Scores]:
    """Yield the scores after a mask, unless the mask has dims that they do not have."""
    if same_shape(value_of(node).shape, value_of(scores.product).shape):
        yield replace(scores, nodes=(*scores.nodes, node), masks=(*scores.masks, masking))
