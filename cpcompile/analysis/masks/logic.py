"""The rules of comparisons and logic, and of operators that choose between two values by a condition."""

from __future__ import annotations

import torch

from cpcompile.analysis.masks.expression import (
    FALSE,
    TRUE,
    ZERO,
    Affine,
    Boolean,
    Choice,
    Compare,
    Expression,
    Number,
    Value,
    coordinate,
)
from cpcompile.analysis.masks.operands import booleans, convert, exact, number_of, operands, result_of
from cpcompile.analysis.masks.read import Reader, Unreadable, reads
from cpcompile.analysis.masks.simplify import (
    COMPARISONS,
    FLOAT_COMPARISONS,
    as_boolean,
    as_value,
    both,
    choose,
    compare,
    either,
    map_leaves,
    negated,
)
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


@reads(
    *(
        getattr(packet, overload)
        for name in COMPARISONS
        for packet in (getattr(aten, name),)
        for overload in ("Tensor", "Scalar")
    )
)
def comparison(reader: Reader, call: Call) -> Expression:
    name = call.target._schema.name.partition("::")[2]
    values = [as_value(operand) for operand in operands(reader, call)]
    within = within_distance(name, *values) or within_distance(FLIPPED.get(name, ""), *reversed(values))
    if within is not None:
        return within

    def leaf(a: Value, b: Value) -> Boolean:
        if isinstance(a, Number) and isinstance(b, Number):
            return TRUE if FLOAT_COMPARISONS[name](a.value, b.value) else FALSE
        return COMPARISONS[name](exact(a), exact(b))

    return map_leaves(leaf, *values)


FLIPPED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}


def within_distance(name: str, distance: Value, bound: Value) -> Boolean | None:
    """Return the comparison of an absolute value with a bound, as those of the value on both sides; None for any other."""
    match distance:
        case Choice(Compare("le", low), Affine() as value, Affine() as opposite) if value == -low and opposite == low:
            if isinstance(bound, Affine) and name in FLIPPED:
                sides = [COMPARISONS[name](side, bound) for side in (value, opposite)]
                return both(*sides) if name in ("le", "lt") else either(*sides)
    return None


@reads(
    aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default, aten.__and__.Scalar, aten.bitwise_and.Scalar
)
def conjunction(reader: Reader, call: Call) -> Expression:
    return both(*booleans(reader, call))


@reads(aten.__or__.Tensor, aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Scalar, aten.bitwise_or.Scalar)
def disjunction(reader: Reader, call: Call) -> Expression:
    return either(*booleans(reader, call))


@reads(
    aten.__xor__.Tensor, aten.bitwise_xor.Tensor, aten.logical_xor.default, aten.__xor__.Scalar, aten.bitwise_xor.Scalar
)
def exclusive(reader: Reader, call: Call) -> Expression:
    a, b = booleans(reader, call)
    return either(both(a, negated(b)), both(negated(a), b))


@reads(aten.logical_not.default, aten.bitwise_not.default)
def negation(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype is not torch.bool:
        raise Unreadable
    return negated(as_boolean(reader.operand(call["self"])))


@reads(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    condition, yes, no = (reader.operand(call[name], result.dim()) for name in ("condition", "self", "other"))
    return choose(as_boolean(condition), convert(yes, result.dtype), convert(no, result.dtype))


@reads(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    rest, condition, fill = (reader.operand(call[name], result.dim()) for name in ("self", "mask", "value"))
    return choose(as_boolean(condition), convert(fill, result.dtype), rest)


@reads(aten.index_put.default)
def put(reader: Reader, call: Call) -> Expression:
    """`x[condition] = value`, of one value for all places."""
    result = result_of(call)
    condition, *others = call["indices"]
    if others or call["accumulate"] or value_of(condition).dtype is not torch.bool:
        raise Unreadable
    if value_of(condition).dim() != result.dim() or value_of(call["values"]).numel() != 1:
        raise Unreadable
    fill = convert(reader.operand(call["values"]), result.dtype)
    return choose(as_boolean(reader.operand(condition)), fill, reader.operand(call["self"]))


@reads(aten.tril.default, aten.triu.default)
def triangle(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    above = coordinate(result.dim() - 1) - coordinate(result.dim() - 2) - number_of(reader, call["diagonal"])
    kept = compare("le", above if call.target is aten.tril.default else -above)
    return choose(kept, reader.operand(call["self"]), convert(ZERO, result.dtype))
