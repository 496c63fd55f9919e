"""Norms of channels on [batch, channels, places]: along the tokens, mean and variance are those of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.over_tokens import cast, widened
from cpcompile.rules.registry import Decision, Indices, Lowering, Names, rule
from cpcompile.rules.statistics import freedom_of, moments

aten = torch.ops.aten


@rule(aten.group_norm.default, aten.instance_norm.default, aten.batch_norm.default)
def norm(call: Call) -> Indices:
    """[n c places], [c] -> [n c places'], mixing what one mean and variance run over"""
    rank = len(call.shape("input"))
    channel: Names = ("c",)
    space: Names = (None,) * (rank - 2)
    batch: Names = ("n",)
    if call.target is aten.group_norm.default:
        channel = (None,)
    elif call.target is aten.batch_norm.default and call["training"]:
        batch = (None,)
    elif call.target is aten.batch_norm.default:
        space = tuple(f"t{i}" for i in range(rank - 2))
    others = {name: channel for name, _ in call.operands() if name != "input"}
    if "running_mean" in others and not (call.target is aten.batch_norm.default and not call["training"]):
        batch, channel = (None,), (None,)  # the running statistics are of the whole batch
    names = (*batch, *channel, *space)
    return Indices({"input": names, **dict.fromkeys(others, channel)}, (names,))


@along_tokens(aten.group_norm.default, aten.instance_norm.default, aten.batch_norm.default)
def along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the mean over all ranks, then the mean square of the distance to it; running statistics are of all tokens"""
    at, is_of_batch = operands.get("input"), call.target is aten.batch_norm.default
    places = {0, *range(2, len(call.shape("input")))}
    if at is None or len(operands) > 1 or at.dim not in places or at.reaches_outside:
        return None
    if not is_of_batch and ("running_mean" in dict(call.operands()) or at.dim == 0):
        return None
    others: dict[str, Placement] = {name: FULL for name, _ in call.operands() if name != "input"}

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        call, x, rank = writer.call, writer.call["input"], len(writer.call.shape("input"))
        x_dtype = x.meta["val"].dtype
        x = widened(writer, x)
        if is_of_batch:
            spread = normalised(writer, at, x, sorted(places))
        else:
            groups = call["num_groups"] if "num_groups" in call else x.meta["val"].shape[1]
            x = writer.insert(aten.unflatten.int, x, 1, [groups, -1])
            spread = normalised(writer, replace(at, dim=at.dim + 1), x, list(range(2, rank + 1)))
            spread = writer.insert(aten.flatten.using_ints, spread, 1, 2)
        for name, operator in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
            if call[name] is not None:
                factor = writer.insert(aten.view.default, call[name], [-1, *(1,) * (rank - 2)])
                spread = writer.insert(operator, spread, factor)
        return [cast(writer, spread, x_dtype)]

    return Decision({"input": at, **others}, (at,), lower=lower)


def normalised(writer: Lowering, at: Sharded, x: fx.Node, dims: list[int]) -> fx.Node:
    """Return `x` less its mean over `dims`, over its deviation; running statistics are updated, if the call has any."""
    call = writer.call
    found = moments(writer, at, x, dims)
    variance = writer.insert(aten.div.Tensor, found.squares, found.count)
    root = writer.insert(aten.rsqrt.default, writer.insert(aten.add.Scalar, variance, call["eps"]))
    if call.arguments.get("running_mean") is not None:
        unbiased = writer.insert(aten.div.Tensor, found.squares, freedom_of(writer, found.count, 1))
        for name, value in (("running_mean", found.mean), ("running_var", unbiased)):
            value = writer.insert(aten.detach.default, writer.insert(aten.squeeze.dims, value, dims))
            value = cast(writer, value, call.tensor(name).dtype)
            updated = writer.insert(aten.lerp.Scalar, call[name], value, call["momentum"])
            writer.insert(aten.copy_.default, call[name], updated)
    return writer.insert(aten.mul.Tensor, found.distance, root)
