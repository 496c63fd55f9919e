"""Statistics over the tokens: truth values, products, variances and norms."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, PARTIAL, Placement, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.extrema import spread_extreme
from cpcompile.rules.over_tokens import (
    all_reduce,
    cast,
    filled,
    masked,
    outside_of,
    reduced,
    square_root,
    stacked,
    whole_count,
    widened,
)
from cpcompile.rules.reduction import reduced_dims
from cpcompile.rules.registry import Decision, Lowering

aten = torch.ops.aten


@along_tokens(
    aten._is_all_true.default,
    aten._is_any_true.default,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.any.default,
    aten.any.dim,
    aten.any.dims,
    aten.prod.default,
    aten.prod.dim_int,
)
def folded(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the operator runs on each rank, and again over what the ranks found"""
    at = reduced(operands, reduced_dims(call))
    if at is None:
        return None
    name = call.target._schema.name.partition("::")[2].removeprefix("_is_").removesuffix("_true")

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = masked(writer, at, writer.call["self"], 0 if name == "any" else 1)
        args, kwargs = writer.call.rebound({"self": x})
        found = stacked(writer, writer.insert(call.target, *args, **kwargs))
        if name == "prod":
            return [writer.insert(aten.prod.dim_int, found, 0)]
        return [writer.insert(aten.amax.default if name == "any" else aten.amin.default, found, [0])]

    return Decision({"self": at}, (FULL,), lower=lower)


VARIANCES = (
    aten.var.correction, aten.std.correction, aten.var_mean.correction, aten.std_mean.correction,
    aten.var.default, aten.std.default, aten.var_mean.default, aten.std_mean.default,
    aten.var.dim, aten.std.dim, aten.var_mean.dim, aten.std_mean.dim,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moments:
    """Over all tokens: how many numbers, their mean, this rank's distances to it, and the sum of their squares.

    Means and sums keep their dims, of size 1. Slots outside the range have the distance 0.
    """

    count: fx.Node | int
    mean: fx.Node
    distance: fx.Node
    squares: fx.Node


def moments(writer: Lowering, at: Sharded, x: fx.Node, dims: list[int]) -> Moments:
    """Write the moments of `x` over `dims`, among them that of the tokens."""
    count = whole_count(writer, at, x, dims)
    is_outside = outside_of(writer, at, x)
    total = writer.insert(aten.sum.dim_IntList, filled(writer, x, is_outside, 0), dims, True)
    mean = writer.insert(aten.div.Tensor, all_reduce(writer, total), count)
    distance = filled(writer, writer.insert(aten.sub.Tensor, x, mean), is_outside, 0)
    squares = writer.insert(aten.sum.dim_IntList, writer.insert(aten.mul.Tensor, distance, distance), dims, True)
    return Moments(count, mean, distance, all_reduce(writer, squares))


def freedom_of(writer: Lowering, count: fx.Node | int, correction: Any) -> fx.Node | Any:
    """Return the count less a correction, as a graph argument."""
    return max(0, count - correction) if isinstance(count, int) else writer.insert(operator.sub, count, correction)


@along_tokens(*VARIANCES)
def variance(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the mean over all ranks, then the mean square of the distance to it"""
    dims = sorted(reduced_dims(call))
    at = reduced(operands, set(dims))
    if at is None or not call.tensor("self").is_floating_point():
        return None
    correction: Any = int(call["unbiased"]) if "unbiased" in call else call["correction"]
    correction = 1 if correction is None else correction
    keep = bool(call.arguments.get("keepdim"))
    name, x_dtype = call.target._schema.name.partition("::")[2], call.tensor("self").dtype
    results: tuple[Placement, ...] = (FULL, FULL) if name.endswith("_mean") else (FULL,)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        found = moments(writer, at, widened(writer, writer.call["self"]), dims)
        spread = writer.insert(aten.div.Tensor, found.squares, freedom_of(writer, found.count, correction))
        spread = square_root(writer, spread) if name.startswith("std") else spread
        values = (spread, found.mean)[: len(results)]
        values = values if keep else tuple(writer.insert(aten.squeeze.dims, value, dims) for value in values)
        return [cast(writer, value, x_dtype) for value in values]

    return Decision({"self": at}, results, lower=lower)


@along_tokens(aten.norm.Scalar, aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default)
def norm(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """sums of powers or the largest over all ranks, for the orders 1, 2 and infinity"""
    at = reduced(operands, reduced_dims(call))
    order: Any = call["ord"] if "ord" in call else call["p"]
    order = 2 if order is None else order
    if at is None or order not in (1, 2, float("inf"), -float("inf")):
        return None
    results: tuple[Placement, ...] = (PARTIAL if order == 1 else FULL,)

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        dims, keep = sorted(reduced_dims(call)), bool(call.arguments.get("keepdim"))
        x = widened(writer, writer.call["self"], call.arguments.get("dtype"))
        size = writer.insert(aten.abs.default, x)
        if order in (float("inf"), -float("inf")):
            return [cast(writer, spread_extreme(writer, at, size, dims, keep, order > 0), call.result.dtype)]
        size = masked(writer, at, size, 0.0)
        if order == 1:
            return [cast(writer, writer.insert(aten.sum.dim_IntList, size, dims, keep), call.result.dtype)]
        total = writer.insert(aten.sum.dim_IntList, writer.insert(aten.mul.Tensor, size, size), dims, keep)
        return [cast(writer, square_root(writer, all_reduce(writer, total)), call.result.dtype)]

    return Decision({"self": at}, results, lower=lower)
