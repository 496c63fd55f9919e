"""The rules of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cpcompile.analysis.masks.expression import Affine, Expression, Number, Value, quotient
from cpcompile.analysis.masks.operands import INDEX_DTYPES, booleans, convert, operands, result_of, rounded
from cpcompile.analysis.masks.read import Reader, Unreadable, is_index, reads
from cpcompile.analysis.masks.simplify import as_value, both, choice, compare, either, map_leaves
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten


def arithmetic(
    reader: Reader, call: Call, integers: Callable[[Affine, Affine], Affine], floats: Callable[[float, float], float]
) -> Expression:
    """Apply a binary operator to the leaves of both operands."""
    dtype = result_of(call).dtype

    def leaf(a: Value, b: Value) -> Value:
        if isinstance(a, Affine) and isinstance(b, Affine):
            return within(integers(a, b), dtype)
        assert isinstance(a, Number) and isinstance(b, Number)
        return rounded(floats(a.value, b.value), dtype)

    return map_leaves(leaf, *(as_value(convert(operand, dtype)) for operand in operands(reader, call)))


def within(value: Affine, dtype: torch.dtype) -> Affine:
    """Return an integer that does not wrap around in `dtype`: a narrow one must be a constant."""
    if dtype in INDEX_DTYPES or (
        not value.terms and torch.iinfo(dtype).min <= value.constant <= torch.iinfo(dtype).max
    ):
        return value
    raise Unreadable


def factor_of(call: Call) -> int:
    """Return what the second operand of a sum is multiplied with."""
    factor = call["alpha"]
    if not isinstance(factor, int) or (factor != 1 and result_of(call).dtype not in INDEX_DTYPES):
        raise Unreadable
    return factor


@reads(aten.add.Tensor, aten.add.Scalar)
def add(reader: Reader, call: Call) -> Expression:
    factor = factor_of(call)
    if result_of(call).dtype is torch.bool:
        return either(*booleans(reader, call))
    return arithmetic(reader, call, lambda a, b: a + b * factor, lambda a, b: a + b)


@reads(aten.sub.Tensor, aten.sub.Scalar)
def sub(reader: Reader, call: Call) -> Expression:
    factor = factor_of(call)
    return arithmetic(reader, call, lambda a, b: a - b * factor, lambda a, b: a - b)


@reads(aten.rsub.Tensor, aten.rsub.Scalar)
def rsub(reader: Reader, call: Call) -> Expression:
    factor = factor_of(call)
    return arithmetic(reader, call, lambda a, b: b - a * factor, lambda a, b: b - a)


@reads(aten.mul.Tensor, aten.mul.Scalar)
def mul(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype is torch.bool:
        return both(*booleans(reader, call))
    return arithmetic(reader, call, product, lambda a, b: a * b)


def product(a: Affine, b: Affine) -> Affine:
    """Return the product, of which one factor is a constant."""
    if a.terms and b.terms:
        raise Unreadable
    return a * b.constant if a.terms else b * a.constant


@reads(aten.neg.default)
def neg(reader: Reader, call: Call) -> Expression:
    def leaf(value: Value) -> Value:
        if isinstance(value, Number):
            return Number(-value.value)
        assert isinstance(value, Affine)
        return -value

    if is_index(result_of(call)) and result_of(call).dtype not in INDEX_DTYPES:
        raise Unreadable
    return map_leaves(leaf, as_value(reader.operand(call["self"])))


@reads(aten.log.default)
def logarithm(reader: Reader, call: Call) -> Expression:
    """The logarithm of numbers that are known: of zeros and ones those that hide and show."""
    dtype = result_of(call).dtype

    def leaf(value: Value) -> Value:
        if not isinstance(value, Number) or value.value < 0:
            raise Unreadable
        return rounded(math.log(value.value) if value.value else -math.inf, dtype)

    return map_leaves(leaf, as_value(convert(reader.operand(call["self"]), dtype)))


@reads(aten.abs.default)
def absolute(reader: Reader, call: Call) -> Expression:
    """The absolute value of an integer: comparisons know it."""
    value = reader.operand(call["self"])
    if not isinstance(value, Affine) or result_of(call).dtype not in INDEX_DTYPES:
        raise Unreadable
    return choice(compare("le", -value), value, -value)


@reads(aten.floor_divide.default, aten.floor_divide.Scalar, aten.div.Tensor_mode, aten.div.Scalar_mode)
def floor_divide(reader: Reader, call: Call) -> Expression:
    """An integer over a positive constant, rounded down."""
    value, divisor = (as_value(operand) for operand in operands(reader, call))
    is_floor = call.arguments.get("rounding_mode", "floor") == "floor"
    if not is_floor or result_of(call).dtype not in INDEX_DTYPES or not isinstance(divisor, Affine):
        raise Unreadable
    if divisor.terms or divisor.constant <= 0 or not isinstance(value, Affine):
        raise Unreadable
    return quotient(value, divisor.constant)
