"""The summands of a mask that is added to the scores: what hides keys, and a bias of slopes and positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.analysis.masks.bias import Bias, BiasReader, read_bias
from cpcompile.analysis.masks.expression import TRUE, Boolean
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.masks.recognise import hides, predicate
from cpcompile.analysis.masks.simplify import as_boolean, both, negated, shifted
from cpcompile.analysis.patterns.fills import fills_of
from cpcompile.analysis.patterns.nodes import converted, is_conversion, source
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_EXPANSIONS = {aten.expand.default, aten.expand_as.default}


@dataclass(frozen=True, slots=True)
class Summands:
    """Where keys are visible, whether those that are not have weight 0 even where all are hidden, and a bias."""

    visible: Boolean = TRUE
    is_infinite: bool = True
    bias: Bias | None = None

    def plus(self, other: Summands | None) -> Summands | None:
        """Return the sum of two, or None where both have a bias."""
        if other is None or (self.bias is not None and other.bias is not None):
            return None
        visible = both(self.visible, other.visible)
        return Summands(visible, self.is_infinite and other.is_infinite, self.bias or other.bias)


def read_summands(mask: fx.Node, reader: Reader, biases: BiasReader) -> Summands | None:
    """Return the summands of a mask, over (batch, head, query, key), or None for one that says something else."""
    tensor = value_of(mask)
    value = reader.read(mask)
    found = None if value is None else predicate(shifted(value, 4 - tensor.dim()), tensor.dtype)
    if found is not None:
        return Summands(*found)
    bias = read_bias(mask, biases)
    if bias is not None:
        return Summands(bias=bias)
    if not biases.is_step(mask):
        return None
    if mask.target in _EXPANSIONS or is_conversion(mask):
        return read_summands(source(mask), reader, biases)
    if mask.target is aten.add.Tensor:
        call = Call.of(mask)
        if call["alpha"] != 1 or not is_tensor(call["other"]):
            return None
        first = read_summands(call["self"], reader, biases)
        return first and first.plus(read_summands(call["other"], reader, biases))
    return read_filled(mask, reader, biases)


def read_filled(mask: fx.Node, reader: Reader, biases: BiasReader) -> Summands | None:
    """Return the summands of a mask that is filled with a number that hides, where a condition says so."""
    for fill in fills_of(mask, reader):
        where = reader.read(fill.condition)
        if where is not None and hides(fill.value, value_of(mask).dtype):
            where = as_boolean(shifted(where, 4 - value_of(fill.condition).dim()))
            rest = Summands(negated(where) if fill.where else where, fill.value == float("-inf"))
            return rest.plus(read_summands(fill.inner, reader, biases))
    return None


def slopes_of(call: Call, bias: Bias) -> fx.Node:
    """Return the slopes `[H]` of an attention."""
    dtype = torch.float64 if call.tensor("q").dtype == torch.float64 else torch.float32
    # The bias has no gradient, or it would not be a mask; it may be one that the graph cut off between slopes and bias.
    node = insert_call(
        call.node, aten.reshape.default, insert_call(call.node, aten.detach.default, bias.slopes.node), [-1]
    )
    node = node if bias.factor == 1 else insert_call(call.node, aten.mul.Tensor, node, bias.factor)
    return converted(call.node, node, dtype)
