"""Scans along the tokens: each rank scans its chunks, then adds to each what all chunks before it come to.

[.. t ..] -> [.. chunks c ..], scanned along c; the last of each chunk, of all ranks and in the order of the sequence,
scanned again, is what the next chunk begins with.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.over_tokens import cast, highest, lowest, masked, stacked
from cpcompile.rules.registry import Decision, Lowering

aten, cp = torch.ops.aten, torch.ops.cpcompile

# How what comes before is combined with the scan of a chunk.
COMBINE = {
    aten.cumsum.default: aten.add.Tensor,
    aten.cumprod.default: aten.mul.Tensor,
    aten.logcumsumexp.default: aten.logaddexp.default,
}
SCANS = {*COMBINE, aten.cummax.default, aten.cummin.default}


def neutral(target: torch._ops.OpOverload, dtype: torch.dtype) -> float | int:
    """Return the number that changes nothing. For `logcumsumexp` a finite one: its gradient at an infinity is NaN."""
    if target is aten.logcumsumexp.default:
        return torch.finfo(dtype).min
    return 0 if target is aten.cumsum.default else 1


def in_chunks(writer: Lowering, x: fx.Node, dim: int) -> fx.Node:
    """Return `x` with its dim viewed as (chunks, slots of a chunk)."""
    return writer.insert(aten.unflatten.int, x, dim, [writer.chunks, -1])


def in_order(writer: Lowering, x: fx.Node, dim: int) -> fx.Node:
    """Return, of `x` with one element for each chunk, those of all ranks in the order of the sequence."""
    own = writer.insert(cp.chunk_indices.default, x, *writer.axis)
    order = writer.insert(aten.argsort.default, writer.insert(aten.flatten.using_ints, stacked(writer, own)))
    every = writer.insert(aten.movedim.int, stacked(writer, x), 0, dim)
    every = writer.insert(aten.flatten.using_ints, every, dim, dim + 1)
    return writer.insert(aten.index_select.default, every, dim, order)


def behind(writer: Lowering, x: fx.Node, dim: int, first: float | int) -> fx.Node:
    """Return `x` with `first` before its first element."""
    return writer.insert(aten.constant_pad_nd.default, x, [0, 0] * (x.meta["val"].dim() - dim - 1) + [1, 0], first)


def of_own_chunks(writer: Lowering, x: fx.Node, dim: int) -> fx.Node:
    """Return what this rank's chunks begin with, of what each chunk of the sequence begins with."""
    own = writer.insert(cp.chunk_indices.default, x, *writer.axis)
    return writer.insert(aten.unsqueeze.default, writer.insert(aten.index_select.default, x, dim, own), dim + 1)


def with_own_before(writer: Lowering, at: Sharded, result: fx.Node, x: fx.Node) -> fx.Node:
    """Return `result` with what a scan would begin with in slots before the range, which have seen nothing.

    What a model makes of a number that it never sees, a quotient of zeros or an infinity, may be NaN. The gradient of a weight
    would be NaN with it, since it multiplies such slots with 0.
    """
    if at.front <= 0:
        return result
    position = writer.insert(cp.positions.default, result, writer.length, *writer.axis)
    is_before = writer.insert(aten.lt.Scalar, position, at.front)
    is_before = writer.insert(aten.view.default, is_before, [-1, *[1] * (result.meta["val"].dim() - at.dim - 1)])
    return writer.insert(aten.where.self, is_before, writer.insert(aten.detach.default, x), result)


@along_tokens(*COMBINE)
def scan(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank scans its chunks, and adds what all chunks before come to"""
    at, dtype = operands["self"], call.result.dtype
    if not holds_tokens_only(call, "self", at, length) or dtype.is_complex:
        return None
    first = neutral(call.target, dtype)
    if at.reaches_outside and at.outside != first:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        dim = at.dim
        x = cast(writer, writer.call["self"], dtype)
        own = writer.insert(call.target, in_chunks(writer, masked(writer, at, x, first), dim), dim + 1)
        totals = in_order(writer, writer.insert(aten.select.int, own, dim + 1, -1), dim)
        before = writer.insert(call.target, behind(writer, totals, dim, first), dim)
        result = writer.insert(COMBINE[call.target], own, of_own_chunks(writer, before, dim))
        if call.target is aten.logcumsumexp.default:
            is_nothing = writer.insert(aten.eq.Scalar, result, first)
            result = writer.insert(aten.masked_fill.Scalar, result, is_nothing, -float("inf"))
        result = writer.insert(aten.flatten.using_ints, result, dim, dim + 1)
        return [with_own_before(writer, at, result, x)]

    result = at.with_range(at.front, at.back, float(first) if at.back >= 0 else None)
    return Decision({"self": at}, (result,), lower=lower)


@along_tokens(aten.cummax.default, aten.cummin.default)
def scan_of_extremes(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank scans its chunks, and takes the best of all chunks before where that is better; ties go to the last"""
    at = operands["self"]
    if at.reaches_outside or not holds_tokens_only(call, "self", at, length):
        return None
    is_largest = call.target is aten.cummax.default
    first = (lowest if is_largest else highest)(call.tensor("self").dtype)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        dim = at.dim
        x = masked(writer, at, writer.call["self"], first)
        own = writer.insert(call.target, in_chunks(writer, x, dim), dim + 1)
        value, index = (writer.insert(operator.getitem, own, i) for i in (0, 1))
        index = writer.insert(aten.add.Tensor, index, first_indices(writer, at, value))
        values, places = (
            behind(writer, in_order(writer, writer.insert(aten.select.int, found, dim + 1, -1), dim), dim, begin)
            for found, begin in ((value, first), (index, 0))
        )
        best = writer.insert(call.target, values, dim)
        values, chunks = (writer.insert(operator.getitem, best, i) for i in (0, 1))
        places = writer.insert(aten.gather.default, places, dim, chunks)
        before, place = (of_own_chunks(writer, found, dim) for found in (values, places))
        is_own = writer.insert(aten.ge.Tensor if is_largest else aten.le.Tensor, value, before)
        if value.meta["val"].is_floating_point():
            is_own = writer.insert(aten.logical_or.default, is_own, writer.insert(aten.isnan.default, value))
        chosen = [writer.insert(aten.where.self, is_own, *pair) for pair in ((value, before), (index, place))]
        value, index = (writer.insert(aten.flatten.using_ints, found, dim, dim + 1) for found in chosen)
        return [with_own_before(writer, at, value, writer.call["self"]), index]

    return Decision({"self": at}, (at, at), lower=lower)


def first_indices(writer: Lowering, at: Sharded, x: fx.Node) -> fx.Node:
    """Return the index in the range of the first slot of each chunk, broadcast to the chunks of `x`."""
    position = writer.insert(cp.positions.default, x, writer.length, *writer.axis)
    start = writer.insert(aten.select.int, in_chunks(writer, position, 0), 1, 0)
    start = writer.insert(aten.sub.Tensor, start, at.front)
    return writer.insert(aten.view.default, start, [-1, *[1] * (x.meta["val"].dim() - at.dim - 1)])
