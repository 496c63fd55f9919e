"""What the rules share: operands as expressions of one kind, and numbers as a dtype holds them."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.analysis.masks.expression import Affine, Boolean, Expression, Number, Value
from cpcompile.analysis.masks.read import Reader, Unreadable
from cpcompile.analysis.masks.simplify import as_boolean, as_value, map_leaves
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten

# They give the values of their first operand, perhaps in another dtype; so does `detach`, which stops gradients.
CONVERSIONS = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
)
# Index arithmetic in a narrower type can wrap around.
INDEX_DTYPES = (torch.int64, torch.int32)


def result_of(call: Call) -> torch.Tensor:
    """Return the fake result, a tensor."""
    assert isinstance(call.result, torch.Tensor)
    return call.result


def number_of(reader: Reader, argument: Any) -> Affine:
    """Return an integer argument."""
    value = reader.operand(argument)
    if not isinstance(value, Affine):
        raise Unreadable
    return value


def operands(reader: Reader, call: Call) -> list[Expression]:
    """Return the two operands of a pointwise operator."""
    rank = result_of(call).dim()
    return [reader.operand(call[name], rank) for name in list(call.arguments)[:2]]


def booleans(reader: Reader, call: Call) -> list[Boolean]:
    """Return the two operands of a logical operator, as booleans."""
    if result_of(call).dtype is not torch.bool:
        raise Unreadable
    return [as_boolean(operand) for operand in operands(reader, call)]


def convert(value: Expression, dtype: torch.dtype) -> Expression:
    """Return the expression as `dtype`."""
    if dtype is torch.bool:
        return as_boolean(value)

    def leaf(number: Value) -> Value:
        if dtype.is_floating_point:
            if isinstance(number, Affine):
                if number.terms:
                    raise Unreadable
                number = Number(float(number.constant))
            assert isinstance(number, Number)
            return rounded(number.value, dtype)
        if isinstance(number, Number):
            number = Affine(integer(number.value))
        if isinstance(number, Affine) and number.terms and dtype not in INDEX_DTYPES:
            raise Unreadable
        return number

    return map_leaves(leaf, as_value(value))


def rounded(value: float, dtype: torch.dtype) -> Number:
    """Return the constant as `dtype` holds it."""
    return Number(float(torch.tensor(value, dtype=torch.float64).to(dtype)))


def integer(value: float) -> int:
    """Return a floating-point number that is an integer as one."""
    if value != value or value in (float("inf"), float("-inf")) or value != int(value):
        raise Unreadable
    return int(value)


def exact(value: Value) -> Affine:
    """Return a number that is an integer as one."""
    if isinstance(value, Number):
        return Affine(integer(value.value))
    assert isinstance(value, Affine)
    return value
