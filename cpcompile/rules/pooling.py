"""Pools on [batch, channels, places], resizing, and windows. Tokens may be the batch, and mostly the channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import PARTIAL, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.over_tokens import masked, reduced, whole_count
from cpcompile.rules.registry import Decision, Indices, Lowering, Names, no_rule, rule

aten = torch.ops.aten

MEANS = {aten.adaptive_avg_pool1d.default: 1, aten.adaptive_avg_pool2d.default: 2, aten.adaptive_avg_pool3d.default: 3}
POOLS = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool1d_with_indices.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d.default: 3,
    aten.adaptive_max_pool1d.default: 1,
    aten.adaptive_max_pool2d.default: 2,
    aten.pixel_shuffle.default: 3,
    aten.pixel_unshuffle.default: 3,
} | MEANS
RESIZES = {
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten._upsample_nearest_exact1d.vec: 1,
    aten._upsample_nearest_exact2d.vec: 2,
    aten._upsample_nearest_exact3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_trilinear3d.vec: 3,
    aten.upsample_bicubic2d.vec: 2,
    aten._upsample_bilinear2d_aa.vec: 2,
    aten._upsample_bicubic2d_aa.vec: 2,
}
RESIZED = "it makes another number of tokens of them, and there are no channels that ranks could share; resize before the model"
OTHER_SEQUENCE = "leaves fewer tokens, which is another sequence: pool before the model, or gather first (strict=False)"


@rule(*POOLS)
def pool(call: Call) -> Indices:
    """[... places] -> [... places']"""
    kept: Names = tuple(f"d{i}" for i in range(len(call.shape("self")) - POOLS[call.target]))
    names = (*kept, *(None,) * POOLS[call.target])
    return Indices({"self": names}, (names,) * len(call.results))


@rule(*RESIZES)
def resize(call: Call) -> Indices:
    """[... places] -> [... places']"""
    kept: Names = tuple(f"d{i}" for i in range(len(call.shape("input")) - RESIZES[call.target]))
    names = (*kept, *(None,) * RESIZES[call.target])
    return Indices({"input": names}, (names,))


@along_tokens(*RESIZES)
def resized(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """not by tokens: a rank resizes all of them for some channels"""
    raise no_rule(call, operands, RESIZED)


@along_tokens(*POOLS)
def along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """a pool of everything is a mean, of which every rank has an addend"""
    rank = len(call.shape("self"))
    dims = list(range(rank - POOLS[call.target], rank))
    at = reduced(operands, set(dims))
    if at is None or call.target not in MEANS or any(size != 1 for size in call["output_size"]):
        raise no_rule(call, operands, f"a pool along the tokens {OTHER_SEQUENCE}")

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        total = writer.insert(aten.sum.dim_IntList, masked(writer, at, x, 0), dims, True)
        return [writer.insert(aten.div.Tensor, total, whole_count(writer, at, x, dims))]

    return Decision({"self": at}, (PARTIAL,), lower=lower)


@rule(aten.unfold.default)
def windows(call: Call) -> Indices:
    """[a b] -> [a b' w], mixing b"""
    dim = call.dim("dimension", "self")
    names = tuple(None if i == dim else f"d{i}" for i in range(len(call.shape("self"))))
    return Indices({"self": names}, ((*names, None),))
