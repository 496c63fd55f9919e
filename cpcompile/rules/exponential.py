"""Softmax and the logarithm of a sum of exponentials over the tokens: the largest and the sum are those of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.extrema import extreme
from cpcompile.rules.over_tokens import all_reduce, cast, filled, outside_of, reduced, widened
from cpcompile.rules.reduction import reduced_dims
from cpcompile.rules.registry import Decision, Lowering

aten = torch.ops.aten
LOGARITHMIC = (aten.log_softmax.int, aten._log_softmax.default)


def shifted(
    writer: Lowering, x: fx.Node, is_outside: fx.Node | None, largest: fx.Node, dims: Sequence[int]
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return `x` less the largest, the exponentials of that, and their sum over all ranks.

    Slots without tokens may hold anything: they are filled before, so that their gradient is 0 and not NaN.
    """
    x = filled(writer, x, is_outside, 0)
    x = writer.insert(aten.sub.Tensor, x, largest)
    exponentials = filled(writer, writer.insert(aten.exp.default, x), is_outside, 0)
    total = all_reduce(writer, writer.insert(aten.sum.dim_IntList, exponentials, dims, True))
    return x, exponentials, total


@along_tokens(
    aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.log_softmax.int, aten._log_softmax.default
)
def softmax(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the exponentials over their sum on all ranks"""
    dim = call.dim("dim", "self")
    at = reduced(operands, {dim})
    if at is None:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = widened(writer, writer.call["self"], call.result.dtype)
        is_outside = outside_of(writer, at, x)
        largest = extreme(writer, x, is_outside, [dim], True)
        is_hidden = None
        if call.target is aten._safe_softmax.default:
            is_hidden = writer.insert(aten.eq.Scalar, largest, -float("inf"))
            largest = writer.insert(aten.masked_fill.Scalar, largest, is_hidden, 0)
        x, exponentials, total = shifted(writer, x, is_outside, largest, [dim])
        total = filled(writer, total, is_hidden, 1)
        if call.target in LOGARITHMIC:
            return [
                cast(
                    writer, writer.insert(aten.sub.Tensor, x, writer.insert(aten.log.default, total)), call.result.dtype
                )
            ]
        return [cast(writer, writer.insert(aten.div.Tensor, exponentials, total), call.result.dtype)]

    return Decision({"self": at}, (at,), lower=lower)


@along_tokens(aten.logsumexp.default)
def logsumexp(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the logarithm of the sum on all ranks"""
    dims = sorted(reduced_dims(call))
    at = reduced(operands, set(dims))
    if at is None:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = widened(writer, writer.call["self"], call.result.dtype)
        is_outside = outside_of(writer, at, x)
        largest = extreme(writer, x, is_outside, dims, True)
        is_finite = writer.insert(aten.isfinite.default, largest)
        largest = writer.insert(aten.where.ScalarOther, is_finite, largest, 0)
        _, _, total = shifted(writer, x, is_outside, largest, dims)
        result = writer.insert(aten.add.Tensor, writer.insert(aten.log.default, total), largest)
        result = result if call["keepdim"] else writer.insert(aten.squeeze.dims, result, dims)
        return [cast(writer, result, call.result.dtype)]

    return Decision({"self": at}, (FULL,), lower=lower)
