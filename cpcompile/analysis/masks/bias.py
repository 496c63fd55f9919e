"""Bias: a floating-point bias of the scores as an expression, where it is made of slopes and positions (ALiBi).

A bias like `slopes[h] * (key - query)` is an integer combination of products of a floating-point element and a place. It is
computed in other steps than those of the graph, and so taken for the same only where each step has the precision of the scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.expression import (
    ZERO,
    Affine,
    Choice,
    Compare,
    Coordinate,
    Expression,
    Load,
    Scaled,
    Value,
    affine,
    coordinate,
    scaled,
)
from cpcompile.analysis.masks.held_tensors import SlopedTable, bias_of, held
from cpcompile.analysis.masks.operands import CONVERSIONS, exact, number_of, operands
from cpcompile.analysis.masks.read import RULES, Reader, Rule, Unreadable, pinned
from cpcompile.analysis.masks.recognise import HEAD, KEY, QUERY
from cpcompile.analysis.masks.simplify import as_value, choice, compare, map_leaves, shifted
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Bias:
    """`factor * slopes[h] * (key - query)` on and before the diagonal, and a number for each row if `has_rows`.

    With `is_distance` it is the same of `-abs(key - query)`, on both sides; else as on one, straight on.
    """

    slopes: Load
    factor: int
    is_distance: bool
    has_rows: bool


class BiasReader(Reader):
    """Reads floating-point numbers as if they were exact; a step of less precision than `dtype` is not read."""

    def __init__(self, gm: fx.GraphModule, dtype: torch.dtype) -> None:
        super().__init__(gm)
        self.dtype = torch.promote_types(dtype, torch.float32)

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that the rule for `node` reads."""
        if self.is_step(node) and node.target in STEPS:
            return [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]
        return super().sources(node)

    def is_step(self, node: fx.Node) -> bool:
        """Tell whether a node computes floating-point numbers that are precise enough."""
        value = value_of(node)
        is_float = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
        return is_float and torch.promote_types(value.dtype, self.dtype) == value.dtype

    def evaluate(self, node: fx.Node) -> Expression | None:
        """Apply the rule for `node`, whose sources are read; what has none is loaded."""
        tensor = value_of(node)
        if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
            return super().evaluate(node)
        rule = STEPS.get(node.target) if node.target in STEPS else RULES.get(node.target)
        table = held(node)
        if isinstance(table, SlopedTable) and self.is_step(node):
            return pinned(bias_of(node, table), tensor)
        try:
            if rule is not None and self.is_step(node):
                return pinned(rule(self, Call.of(node)), tensor)
        except Unreadable:
            pass
        return pinned(affine(Load(node, tuple(coordinate(dim) for dim in range(tensor.dim())))), tensor)


def _conversion(reader: Reader, call: Call) -> Expression:
    return reader.operand(next(call.operands())[1])


def _arange(reader: Reader, call: Call) -> Expression:
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    if isinstance(start, float):
        start = int(start) if start == int(start) else None
    if start is None or step != int(step):
        raise Unreadable
    return number_of(reader, start) + coordinate(0) * int(step)


def _linear(sign: int, other_sign: int) -> Rule:
    def rule(reader: Reader, call: Call) -> Expression:
        if call["alpha"] != 1:
            raise Unreadable
        values = (as_value(operand) for operand in operands(reader, call))
        return map_leaves(lambda a, b: exact(a) * sign + exact(b) * other_sign, *values)

    return rule


def _neg(reader: Reader, call: Call) -> Expression:
    return map_leaves(lambda a: -exact(a), as_value(reader.operand(call["self"])))


def _mul(reader: Reader, call: Call) -> Expression:
    return map_leaves(lambda a, b: product(exact(a), exact(b)), *(as_value(x) for x in operands(reader, call)))


def _abs(reader: Reader, call: Call) -> Expression:
    value = reader.operand(call["self"])
    if not isinstance(value, Affine):
        raise Unreadable
    return choice(compare("le", -value), value, -value)


def product(a: Affine, b: Affine) -> Affine:
    """Return the product of an integer and one floating-point element, or of a number and anything."""
    for one, other in ((a, b), (b, a)):
        if not one.terms:
            return other * one.constant
        if one.constant == 0 and len(one.terms) == 1 and not any(isinstance(part, Scaled) for part, _ in other.terms):
            ((atom, factor),) = one.terms
            if isinstance(atom, Load) and value_of(atom.node).dtype.is_floating_point:
                return scaled(atom, other) * factor
    raise Unreadable


STEPS: dict[object, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.add.Tensor: _linear(1, 1),
    aten.sub.Tensor: _linear(1, -1),
    aten.rsub.Scalar: _linear(-1, 1),
    aten.neg.default: _neg,
    aten.mul.Tensor: _mul,
    aten.abs.default: _abs,
    **dict.fromkeys((*CONVERSIONS, aten.detach.default), _conversion),
}


def read_bias(node: fx.Node, reader: BiasReader) -> Bias | None:
    """Return what a floating-point mask `[..., S]` adds to the scores as slopes and positions, or None for any other."""
    tensor = value_of(node)
    if not tensor.dtype.is_floating_point or tensor.dim() > 4:
        return None
    value = reader.read(node)
    return None if value is None else recognise_bias(as_value(shifted(value, 4 - tensor.dim())))


def recognise_bias(value: Value) -> Bias | None:
    """Return the bias that an expression over (batch, head, query, key) is, or None."""
    match value:
        case Affine():
            return linear(value)
        case Choice(Compare("le", side), Affine() as yes, Affine() as no) if side in (KEY - QUERY, QUERY - KEY):
            before = linear(yes if side == KEY - QUERY else no)
            if before is not None and not before.has_rows and yes == -no:
                return Bias(before.slopes, before.factor, is_distance=True, has_rows=False)
    return None


def linear(value: Affine) -> Bias | None:
    """Return the bias of `factor * slopes[h] * key + c`, where c does not depend on the key."""
    of_key = [(atom, factor) for atom, factor in value.terms if KEY_DIM in dims(atom)]
    if len(of_key) != 1:
        return None
    ((atom, factor),) = of_key
    if not isinstance(atom, Scaled) or affine(atom.factor) != KEY or not is_per_head(atom.load):
        return None
    has_rows = value != scaled(atom.load, KEY - QUERY) * factor
    return Bias(atom.load, factor, is_distance=False, has_rows=has_rows)


KEY_DIM = 3


def dims(atom: object) -> set[int]:
    """Return the dims whose coordinates an atom depends on."""
    match atom:
        case Coordinate(dim):
            return {dim}
        case Load(_, indices):
            return {dim for index in indices for part, _ in index.terms for dim in dims(part)}
        case Scaled(load, factor):
            return dims(load) | dims(factor)
    return {KEY_DIM} if hasattr(atom, "value") else set()


def is_per_head(load: Load) -> bool:
    """Tell whether a load is of one element for each head."""
    sizes = value_of(load.node).shape
    others = [i for i, index in enumerate(load.indices) if index != HEAD]
    is_one = all(load.indices[i] == ZERO and statically_known_true(sizes[i] == 1) for i in others)
    return is_one and len(others) == len(sizes) - 1
