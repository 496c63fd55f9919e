"""Operators on groups of tokens: windows, strided convolutions and pools, and tokens that are repeated.

A rank that holds whole groups of `stride` tokens (`Sharded(inner=stride)`) computes what reads no other group by itself;
`rules.joined` brings the groups to the ranks. Each result is then one token of the sequence of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules import dims, pooling  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.convolution import (
    CONVOLUTIONS,
    TRANSPOSED,
    by_chunk,
    is_transposed,
    paddings,
    range_of_windows,
    reaches,
    spatial,
)
from cpcompile.rules.registry import Decision, Lowering

aten, cp = torch.ops.aten, torch.ops.cpcompile

POOLS = {
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
}


def stride_along(call: Call, dim: int) -> int | None:
    """Return the stride of an operator along a dim if each result reads one group of as many elements, else None."""
    if call.target is aten.unfold.default:
        return int(call["step"]) if dim == call.dim("dimension", "self") else None
    if call.target is aten.col2im.default:
        return tokens_of_row(call) if dim == len(call.shape("self")) - 1 else None
    if call.target in CONVOLUTIONS:
        i = dim - (len(call.shape("input")) - len(paddings(call)))
        if i < 0 or paddings(call)[i] != (0, 0) or call.arguments.get("transposed"):
            return None
        stride = int(spatial(call, "stride")[i])
        return stride if reaches(call)[i] < stride else None
    if call.target in POOLS:
        rank = POOLS[call.target]
        i = dim - (len(call.shape("self")) - rank)

        def entry(name: str) -> int:
            given = call[name] if isinstance(call[name], list | tuple) else [call[name]]
            return int(given[i if len(given) == rank else 0])

        if i < 0 or entry("padding") or call["ceil_mode"] or ("dilation" in call and entry("dilation") != 1):
            return None
        stride = entry("stride") if call["stride"] else entry("kernel_size")
        return stride if entry("kernel_size") <= stride else None
    return None


def patch_reaches(call: Call) -> list[int]:
    """Return, for both dims of an image, how far apart the first and the last element of a patch are."""
    return [step * (size - 1) for step, size in zip(call["dilation"], call["kernel_size"], strict=True)]


def patches_of(call: Call) -> list[int]:
    """Return how many patches are folded along both dims of an image."""
    entries = zip(call["output_size"], patch_reaches(call), call["padding"], call["stride"], strict=True)
    return [(size + 2 * pad - reach - 1) // stride + 1 for size, reach, pad, stride in entries]


def tokens_of_row(call: Call) -> int:
    """Return how many patches that are folded make a row; 1 if there is only one row."""
    rows, columns = patches_of(call)
    return columns if rows > 1 else 1


def overlap_along(call: Call, dim: int) -> int | None:
    """Return how many more groups of a stride the windows of a convolution read along a dim; None if it has no stride there."""
    if call.target not in CONVOLUTIONS or is_transposed(call):
        return None
    i = dim - (len(call.shape("input")) - len(paddings(call)))
    stride = int(spatial(call, "stride")[i]) if i >= 0 else 1
    return reaches(call)[i] // stride if stride > 1 else None


@along_tokens(*CONVOLUTIONS)
def overlapping(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank has whole groups of tokens, and reads those behind its chunks that its windows reach"""
    at = operands.get("input")
    if set(operands) != {"input"} or at is None or at.inner == 1 or not at.covers_all:
        return None
    reach, rank = overlap_along(call, at.dim), len(paddings(call))
    i = at.dim - (len(call.shape("input")) - rank)
    others = [before if j != i else 0 for j, (before, _) in enumerate(paddings(call))]
    is_even = all(before == behind for j, (before, behind) in enumerate(paddings(call)) if j != i)
    if not reach or at.inner != spatial(call, "stride")[i] or paddings(call)[i] != (0, 0) or not is_even:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, dim, chunks = writer.call["input"], at.dim, writer.chunks
        x = writer.insert(aten.unflatten.int, x, dim, [-1, at.inner])
        x = writer.insert(cp.halo_tokens.default, x, dim, 0, reach, writer.length, *writer.axis)
        x = writer.insert(aten.flatten.using_ints, x, dim, dim + 1)
        return [by_chunk(writer, x, dim, others, chunks)]

    wanted = {name: at if name == "input" else FULL for name, _ in call.operands()}
    return Decision(wanted, (result_of_groups(call, at, length),), lower=lower)


def result_of_groups(call: Call, at: Sharded, length: Any) -> Sharded:
    """Return the placement of a result for each group; the last groups may have none."""
    back = sympy.expand(expression(length) - expression(call.results[0].shape[at.dim]))
    return replace(at, inner=1, back=int(back))


@along_tokens(*CONVOLUTIONS, *POOLS)
def strided(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank has whole groups of tokens, and a result for each"""
    name = "input" if "input" in call else "self"
    at = operands.get(name)
    if at is None or len(operands) > 1 or at.inner == 1 or stride_along(call, at.dim) != at.inner or not at.covers_all:
        return None
    others: dict[str, Placement] = {other: FULL for other, _ in call.operands() if other != name}
    return Decision({name: at, **others}, (result_of_groups(call, at, length),) * len(call.results))


@along_tokens(*TRANSPOSED, aten.convolution.default)
def spread(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank spreads its own tokens over as many results as the stride: these are an inner factor of the dim"""
    at = operands.get("input")
    if not is_transposed(call) or at is None or len(operands) > 1 or not at.covers_all:
        return None
    i = at.dim - (len(call.shape("input")) - len(reaches(call)))
    if i < 0 or reaches(call)[i] >= (stride := int(spatial(call, "stride")[i])) or paddings(call)[i] != (0, 0):
        return None
    if expression(call.results[0].shape[at.dim]) != expression(call.shape("input")[at.dim]) * stride:
        return None
    others: dict[str, Placement] = {other: FULL for other, _ in call.operands() if other != "input"}
    return Decision({"input": at, **others}, (replace(at, inner=at.inner * stride),))


@along_tokens(aten.unfold.default)
def windows(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each chunk is extended by the tokens that its windows read"""
    at, size, step = operands["self"], int(call["size"]), int(call["step"])
    if at.dim != call.dim("dimension", "self") or at.inner != step:
        return None
    if step == 1 and (not holds_tokens_only(call, "self", at, length) or at.outside not in (None, 0.0)):
        return None
    reach = -(-size // step) - 1
    if step > 1:
        if not at.covers_all:
            return None
        result, before = replace(at, inner=1, back=reach), 0
    else:
        result = range_of_windows(call, at, reach, (0, 0))
        before = result.front - at.front

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, dim, chunks = writer.call["self"], at.dim, writer.chunks
        x = writer.insert(aten.unflatten.int, x, dim, [-1, step])
        x = writer.insert(cp.halo_tokens.default, x, dim, before, reach - before, writer.length, *writer.axis)
        x = writer.insert(aten.unflatten.int, x, dim, [chunks, -1])
        x = writer.insert(aten.flatten.using_ints, x, dim + 1, dim + 2)
        x = writer.insert(aten.unfold.default, x, dim + 1, size, step)
        return [writer.insert(aten.flatten.using_ints, x, dim, dim + 1)]

    return Decision({"self": at}, (result,), padding={"self": 0.0}, lower=lower)


@along_tokens(aten.repeat_interleave.self_int)
def repeat_interleave(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank repeats its own tokens: the copies are an inner factor of the dim"""
    at = operands["self"]
    if call["dim"] is None or call.dim("dim", "self") != at.dim or not at.covers_all:
        return None
    if not isinstance(call["repeats"], int):
        return None
    return Decision({"self": at}, (replace(at, inner=at.inner * call["repeats"]),), {"output_size": None})
