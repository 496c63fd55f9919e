"""Fills: a tensor of which some elements are replaced by one number, in every form that says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.masks.expression import ONE, ZERO, Affine, Choice, Expression, Number, is_boolean
from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_FILLS = {aten.masked_fill.Scalar, aten.masked_fill.Tensor}
_SELECTIONS = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}


@dataclass(frozen=True, slots=True)
class Fill:
    """`inner`, replaced by `value` where `condition` is not 0, or where it is 0 if not `where`."""

    inner: fx.Node
    condition: fx.Node
    value: float
    where: bool


def fills_of(node: fx.Node, reader: Reader) -> Iterator[Fill]:
    """Yield the readings of a node as a fill; a product with zeros and ones fills with 0."""
    for inner, condition, value, where in _sides(node, reader):
        number = constant(reader, value)
        if number is not None and is_tensor(inner):
            yield Fill(inner, condition, number, where)


def _sides(node: fx.Node, reader: Reader) -> Iterator[tuple[Any, fx.Node, Any, bool]]:
    if node.target in _FILLS:
        call = Call.of(node)
        yield call["self"], call["mask"], call["value"], True
    elif node.target in _SELECTIONS:
        call = Call.of(node)
        yield call["self"], call["condition"], call["other"], False
        yield call["other"], call["condition"], call["self"], True
    elif node.target is aten.index_put.default:
        call = Call.of(node)
        *whole, condition = call["indices"]
        is_last = condition is not None and len(whole) + value_of(condition).dim() == value_of(node).dim()
        if is_last and not any(whole) and value_of(condition).dtype is torch.bool and not call["accumulate"]:
            yield call["self"], condition, call["values"], True
    elif node.target is aten.mul.Tensor:
        call = Call.of(node)
        for inner, factor in ((call["self"], call["other"]), (call["other"], call["self"])):
            if is_tensor(factor) and is_zero_or_one(factor, reader):
                yield inner, factor, 0, False


def is_zero_or_one(node: fx.Node, reader: Reader) -> bool:
    """Tell whether a tensor is known to hold nothing but zeros and ones, and takes no gradient."""
    if value_of(node).dtype is torch.bool:
        return True
    value = reader.read(node)
    return value is not None and are_zero_or_one(value)


def are_zero_or_one(value: Expression) -> bool:
    """Tell whether an expression is 0 or 1."""
    match value:
        case Number(number):
            return number in (0, 1)
        case Affine():
            return value in (ZERO, ONE)
        case Choice(_, yes, no):
            return are_zero_or_one(yes) and are_zero_or_one(no)
    return is_boolean(value)
