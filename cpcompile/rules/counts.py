"""Operators that sort tokens into a few bins: every rank counts or adds up its own tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import FULL, PARTIAL, Sharded
from cpcompile.rules import scatter  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.ranges import constant_value
from cpcompile.rules.registry import Decision, Indices, Lowering, rule

aten, cp = torch.ops.aten, torch.ops.cpcompile


@rule(aten.histc.default)
def histogram(call: Call) -> Indices:
    """[...] -> [bins], a partial sum over the tokens; the range of the bins must be given"""
    names = tuple(f"d{i}" for i in range(len(call.shape("self"))))
    is_given = call["min"] < call["max"]  # else it is the least and the greatest element
    return Indices({"self": names}, ((None,),), summed=is_given, padding={"self": float(call["max"]) + 1})


@along_tokens(aten.scatter_add.default, aten.index_add.default)
def added_in_bins(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """every rank adds its tokens to zeros, and the sums are added up"""
    dim, is_index_add = call.dim("dim", "self"), call.target is aten.index_add.default
    source = "source" if is_index_add else "src"
    given = {source: dim, "index": 0 if is_index_add else dim}
    at = next(iter(operands.values()))
    if not set(operands) <= set(given) or any(p.dim != given[name] for name, p in operands.items()):
        return None
    factors = {(p.inner, p.sequence, p.front, p.back) for p in operands.values()}
    sizes = {expression(call.shape(name)[d]) for name, d in given.items() if call.shape(name)}
    if len(factors) > 1 or len(sizes) > 1 or at.reaches_outside or call.result.dtype == torch.bool:
        return None
    wanted = {name: Sharded(d, at.inner, at.front, at.back, at.sequence) for name, d in given.items()}
    is_sum = constant_value(call["self"]) == 0

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        whole = writer.call["self"]
        args, kwargs = writer.call.rebound({"self": writer.insert(aten.zeros_like.default, whole)})
        addend = writer.insert(call.target, *args, **kwargs)
        if is_sum:
            return [addend]
        _, world_size, group, *_ = writer.axis
        total = writer.insert(cp.all_reduce.default, addend, world_size, group)
        return [writer.insert(aten.add.Tensor, whole, total)]

    padding = {source: 0.0, "index": 0.0}
    return Decision({**wanted, "self": FULL}, (PARTIAL if is_sum else FULL,), padding=padding, lower=lower)


@rule(aten.bincount.default)
def bins(call: Call) -> Indices:
    """[a] -> [bins], closed along a"""
    return Indices({name: (None,) for name, _ in call.operands()}, ((None,),))


@along_tokens(aten.bincount.default)
def counted(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """every rank counts its tokens in `minlength` bins; a larger number than that is an error when it comes"""
    count, (at, *_) = call["minlength"], operands.values()
    if (
        set(operands) != {"self"}
        or call["weights"] is not None
        or at.reaches_outside
        or not isinstance(count, int)
        or count == 0
    ):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        numbers = writer.insert(aten.to.dtype, writer.call["self"], torch.int64)
        places = writer.insert(aten.add.Tensor, numbers, 1)  # padding, which holds -1, has the first one
        zeros = writer.insert(aten.new_zeros.default, places, [count + 1])
        ones = writer.insert(aten.ones_like.default, places)
        counts = writer.insert(aten.scatter_add.default, zeros, 0, places, ones)
        return [writer.insert(aten.slice.Tensor, counts, 0, 1)]

    return Decision({"self": at}, (PARTIAL,), padding={"self": -1.0}, lower=lower)
