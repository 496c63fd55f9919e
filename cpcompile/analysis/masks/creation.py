"""The rules of operators that create tensors, and of those that only convert or copy one."""

from __future__ import annotations

import torch

from cpcompile.analysis.masks.expression import ONE, ZERO, Expression, coordinate
from cpcompile.analysis.masks.operands import CONVERSIONS, INDEX_DTYPES, convert, number_of, result_of
from cpcompile.analysis.masks.read import Reader, Unreadable, reads
from cpcompile.ir.operator_call import Call

aten = torch.ops.aten


@reads(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(reader: Reader, call: Call) -> Expression:
    if result_of(call).dtype not in INDEX_DTYPES:
        raise Unreadable
    start = number_of(reader, call.arguments.get("start", 0))
    step = call.arguments.get("step", 1)
    if not isinstance(step, int):
        raise Unreadable
    return start + coordinate(0) * step


@reads(
    aten.ones.default,
    aten.new_ones.default,
    aten.ones_like.default,
)
def ones(reader: Reader, call: Call) -> Expression:
    return convert(ONE, result_of(call).dtype)


@reads(aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default)
def zeros(reader: Reader, call: Call) -> Expression:
    return convert(ZERO, result_of(call).dtype)


@reads(aten.full.default, aten.new_full.default, aten.full_like.default)
def full(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(call["fill_value"]), result_of(call).dtype)


@reads(aten.scalar_tensor.default)
def scalar_tensor(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(call["s"]), result_of(call).dtype)


@reads(*CONVERSIONS, aten.detach.default, aten.lift_fresh_copy.default)
def conversion(reader: Reader, call: Call) -> Expression:
    return convert(reader.operand(next(call.operands())[1]), result_of(call).dtype)
