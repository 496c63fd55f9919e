"""The largest and the smallest over the tokens, and where they are: in the order of the whole sequence, as on one device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, PARTIAL, Placement, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.over_tokens import (
    NO_TOKEN,
    all_reduce,
    filled,
    highest,
    indices,
    lowest,
    outside_of,
    reduced,
    stacked,
)
from cpcompile.rules.reduction import reduced_dims
from cpcompile.rules.registry import Decision, Lowering

aten = torch.ops.aten
LARGEST = (aten.amax.default, aten.max.default, aten.max.dim, aten.argmax.default)


def extreme(writer: Lowering, x: fx.Node, is_outside: fx.Node | None, dims: Sequence[int], is_largest: bool) -> fx.Node:
    """Return the largest or the smallest over all ranks, without gradient; every dim is kept."""
    reduce, worst = (aten.amax.default, lowest) if is_largest else (aten.amin.default, highest)
    known = filled(writer, writer.insert(aten.detach.default, x), is_outside, worst(x.meta["val"].dtype))
    return writer.insert(reduce, stacked(writer, writer.insert(reduce, known, dims, True)), [0])


def spread_extreme(
    writer: Lowering, at: Sharded, x: fx.Node, dims: Sequence[int], keep: bool, is_largest: bool
) -> fx.Node:
    """Return the largest or the smallest; its gradient is spread evenly over all elements that are as large."""
    is_outside = outside_of(writer, at, x)
    best = extreme(writer, x, is_outside, dims, is_largest)
    if x.meta["val"].is_floating_point():
        ties = filled(writer, writer.insert(aten.eq.Tensor, x, best), is_outside, 0)
        count = all_reduce(writer, writer.insert(aten.sum.dim_IntList, ties, dims, True))
        total = writer.insert(aten.sum.dim_IntList, writer.insert(aten.where.ScalarOther, ties, x, 0), dims, True)
        total = all_reduce(writer, total)
        # The mean of equal numbers may be rounded: the value is the number itself, the gradient that of the mean.
        change = writer.insert(aten.sub.Tensor, total, writer.insert(aten.detach.default, total))
        rounded = writer.insert(aten.add.Tensor, best, writer.insert(aten.div.Tensor, change, count))
        mean = writer.insert(aten.div.Tensor, total, count)
        best = writer.insert(aten.where.self, writer.insert(aten.isfinite.default, best), rounded, mean)
    return best if keep else writer.insert(aten.squeeze.dims, best, dims)


def first_index(writer: Lowering, x: fx.Node, index: fx.Node, dim: int, is_largest: bool) -> fx.Node:
    """Return the first index of the largest or the smallest, or of a NaN; the dim is kept."""
    is_outside = writer.insert(aten.eq.Scalar, index, NO_TOKEN)
    best = extreme(writer, x, is_outside, [dim], is_largest)
    hit = writer.insert(aten.eq.Tensor, x, best)
    if x.meta["val"].is_floating_point():
        hit = writer.insert(aten.logical_or.default, hit, writer.insert(aten.isnan.default, x))
    candidates = writer.insert(aten.where.ScalarOther, hit, index, NO_TOKEN)
    found = stacked(writer, writer.insert(aten.amin.default, candidates, [dim], True))
    return writer.insert(aten.amin.default, found, [0])


@along_tokens(aten.amax.default, aten.amin.default, aten.max.default, aten.min.default)
def extremum(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the largest over all ranks; its gradient is spread evenly over all elements that are as large"""
    dims = sorted(reduced_dims(call))
    at = reduced(operands, set(dims))
    if at is None:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        keep = bool(call.arguments.get("keepdim"))
        return [spread_extreme(writer, at, writer.call["self"], dims, keep, call.target in LARGEST)]

    return Decision({"self": at}, (FULL,), lower=lower)


@along_tokens(aten.max.dim, aten.min.dim)
def extremum_and_index(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the largest over all ranks and its first index, which alone gets the gradient"""
    dim = call.dim("dim", "self")
    at = reduced(operands, {dim})
    if at is None:
        return None
    is_floating = call.tensor("self").is_floating_point()
    results: tuple[Placement, ...] = (PARTIAL if is_floating else FULL, FULL)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        places = indices(writer, at, x)
        index = first_index(writer, x, places, dim, call.target in LARGEST)
        if is_floating:
            chosen = writer.insert(aten.eq.Tensor, places, index)
            own = writer.insert(aten.where.ScalarOther, chosen, x, 0)
            value = writer.insert(aten.sum.dim_IntList, own, [dim], bool(call["keepdim"]))
        else:
            value = extreme(writer, x, writer.insert(aten.eq.Scalar, places, NO_TOKEN), [dim], call.target in LARGEST)
            value = value if call["keepdim"] else writer.insert(aten.squeeze.dims, value, [dim])
        return [value, index if call["keepdim"] else writer.insert(aten.squeeze.dims, index, [dim])]

    return Decision({"self": at}, results, lower=lower)


@along_tokens(aten.argmax.default, aten.argmin.default)
def index_of_extremum(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the first index of the largest over all ranks"""
    at = reduced(operands, reduced_dims(call))
    behind = call.shape("self")[at.dim + 1 :] if at is not None else ()
    if at is None or (call["dim"] is None and not all(isinstance(size, int) for size in behind)):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, place = writer.call["self"], at
        if call["dim"] is None:
            x, place = writer.insert(aten.flatten.using_ints, x), replace(at, dim=0, inner=at.inner * prod(behind))
        places = indices(writer, place, x)
        index = first_index(writer, x, places, place.dim, call.target in LARGEST)
        if call["dim"] is None:
            return [writer.insert(aten.view.default, index, list(call.result.shape))]
        return [index if call["keepdim"] else writer.insert(aten.squeeze.dims, index, [place.dim])]

    return Decision({"self": at}, (FULL,), lower=lower)
