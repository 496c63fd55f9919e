"""Convolutions: local where the tokens are the batch; along the tokens, each chunk is extended by its neighbours' tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.ranges import sliced_off
from cpcompile.rules.registry import Decision, Indices, Lowering, Names, no_rule, rule

aten, cp = torch.ops.aten, torch.ops.cpcompile

BY_RANK = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


def spatial(call: Call, name: str) -> list[Any]:
    """Return an argument of which each spatial dim has one entry."""
    rank = len(call.shape("weight")) - 2
    given = call[name]
    return list(given) * (rank if len(given) == 1 else 1)


def paddings(call: Call) -> list[tuple[int, int]]:
    """Return the zeros before and behind each spatial dim."""
    reach = reaches(call)
    if call["padding"] == "valid":
        return [(0, 0)] * len(reach)
    if call["padding"] == "same":
        return [(n // 2, n - n // 2) for n in reach]
    return [(n, n) for n in spatial(call, "padding")]


def reaches(call: Call) -> list[int]:
    """Return, for each spatial dim, how far apart the first and the last element are that one result reads."""
    sizes, steps = call.shape("weight")[2:], spatial(call, "dilation")
    return [step * (int(size) - 1) for size, step in zip(sizes, steps, strict=True)]


def is_transposed(call: Call) -> bool:
    """Tell whether a convolution spreads each element over several results."""
    return call.target in TRANSPOSED or bool(call.arguments.get("transposed"))


@rule(*CONVOLUTIONS, *TRANSPOSED)
def convolution(call: Call) -> Indices:
    """[b c t], [n c k] -> [b n t'], mixing t where k > 1"""
    rank = len(call.shape("weight")) - 2
    space: Names = (None,) * rank
    if not is_transposed(call):
        places = zip(reaches(call), paddings(call), spatial(call, "stride"), strict=True)
        space = tuple(f"t{i}" if place == (0, (0, 0), 1) else None for i, place in enumerate(places))
    batch: Names = ("b",) if len(call.shape("input")) == rank + 2 else ()
    names = (*batch, None, *space)
    others = {name: (None,) * len(call.shape(name)) for name, _ in call.operands() if name != "input"}
    return Indices({"input": names, **others}, (names,))


@along_tokens(*CONVOLUTIONS)
def along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each chunk is extended by the tokens that its results read and then runs by itself"""
    rank = len(call.shape("weight")) - 2
    at = operands.get("input")
    if set(operands) != {"input"} or at is None or is_transposed(call):
        return None
    i = at.dim - (len(call.shape("input")) - rank)
    if i < 0 or not holds_tokens_only(call, "input", at, length):
        return None
    if spatial(call, "stride")[i] != 1:
        reason = (
            f"a stride of {spatial(call, 'stride')[i]} along the tokens leaves fewer of them, which is another sequence"
        )
        raise no_rule(call, operands, reason)
    reach, pads = reaches(call)[i], paddings(call)
    others = [before if j != i else 0 for j, (before, _) in enumerate(pads)]
    is_even = all(before == behind for j, (before, behind) in enumerate(pads) if j != i)
    if (at.reaches_outside and at.outside != 0.0) or not is_even:
        return None
    result = range_of_windows(call, at, reach, pads[i])
    before = result.front + pads[i][0] - at.front

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        chunks = writer.chunks
        x = writer.insert(
            cp.halo_tokens.default, writer.call["input"], at.dim, before, reach - before, writer.length, *writer.axis
        )
        return [by_chunk(writer, x, at.dim, others, chunks)]

    wanted = {name: at if name == "input" else FULL for name, _ in call.operands()}
    return Decision(wanted, (result,), padding={"input": 0.0}, lower=lower)


def range_of_windows(call: Call, at: Sharded, reach: int, pads: tuple[int, int]) -> Sharded:
    """Return the range of the result: of what is cut off, the users' next slice or else a causal convolution decides.

    Result t may have any slot from that of the first token that it reads to that of the last.
    """
    shorter = reach - sum(pads)
    first, total = at.front - pads[0], at.front + at.back + shorter
    cuts = [
        off[0]
        for user in call.node.users
        if user.target is aten.slice.Tensor and (off := cut_off(user, at.dim)) is not None
    ]
    if shorter < 0:
        front = -cuts[0] if cuts else at.front
    else:
        front = min(max(at.front + shorter, 0), max(total, 0)) if at.reaches_outside else at.front + shorter
    front = min(max(front, first), first + reach)
    return at.with_range(front, total - front)


def cut_off(user: fx.Node, dim: int) -> tuple[int, int] | None:
    """Return how many tokens a slice leaves out at the start and at the end."""
    call = Call.of(user)
    return sliced_off(call) if call.dim("dim", "self") == dim else None


def by_chunk(writer: Lowering, x: fx.Node, dim: int, padding: list[int], chunks: int) -> fx.Node:
    """Return the convolution of extended chunks."""
    call, rank = writer.call, len(padding)
    is_batched = len(call.shape("input")) == rank + 2
    if not is_batched:
        x, dim = writer.insert(aten.unsqueeze.default, x, 0), dim + 1
    others = spatial(call, "stride"), padding, spatial(call, "dilation"), call["groups"]

    def run(x: fx.Node) -> fx.Node:
        return writer.insert(BY_RANK[rank], x, call["weight"], call["bias"], *others)

    x = with_chunks_as_rows(writer, x, dim, dim, chunks, run)
    return x if is_batched else writer.insert(aten.squeeze.dim, x, 0)


def with_chunks_as_rows(
    writer: Lowering, x: fx.Node, dim: int, to: int, chunks: int, run: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Return what `run` makes of extended chunks, which are more rows of the batch: their tokens go from `dim` to `to`."""
    if chunks == 1:
        return run(x)
    x = writer.insert(aten.unflatten.int, x, dim, [chunks, -1])
    x = writer.insert(aten.movedim.int, x, dim, 1)
    x = run(writer.insert(aten.flatten.using_ints, x, 0, 1))
    x = writer.insert(aten.unflatten.int, x, 0, [-1, chunks])
    x = writer.insert(aten.movedim.int, x, 1, to)
    return writer.insert(aten.flatten.using_ints, x, to, to + 1)


@rule(aten.im2col.default)
def patches(call: Call) -> Indices:
    """[n c h w] -> [n (c k) l], mixing all but n"""
    batch: Names = ("n",) if len(call.shape("self")) == 4 else ()
    return Indices({"self": (*batch, None, None, None)}, ((*batch, None, None),))


@along_tokens(aten.im2col.default)
def patches_along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each chunk is extended by the tokens that its patches read; the other dim leaves one patch for each token"""
    at, shape = operands["self"], call.shape("self")
    i = at.dim - 2
    if len(shape) != 4 or i < 0 or not holds_tokens_only(call, "self", at, length) or call["stride"][i] != 1:
        return None
    if (at.reaches_outside and at.outside != 0.0) or str(call.result.shape[2]) != str(patches_of(call, i)):
        return None
    reach, pad = call["dilation"][i] * (call["kernel_size"][i] - 1), call["padding"][i]
    result = range_of_windows(call, at, reach, (pad, pad))
    before = result.front + pad - at.front
    padding = [0 if j == i else each for j, each in enumerate(call["padding"])]

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, chunks = writer.call["self"], writer.chunks
        x = writer.insert(cp.halo_tokens.default, x, at.dim, before, reach - before, writer.length, *writer.axis)

        def run(x: fx.Node) -> fx.Node:
            return writer.insert(call.target, x, call["kernel_size"], call["dilation"], padding, call["stride"])

        return [with_chunks_as_rows(writer, x, at.dim, 2, chunks, run)]

    return Decision({"self": at}, (replace(result, dim=2),), padding={"self": 0.0}, lower=lower)


def patches_of(call: Call, i: int) -> Any:
    """Return how many patches begin along a spatial dim."""
    size, reach = call.shape("self")[2 + i], call["dilation"][i] * (call["kernel_size"][i] - 1)
    return (size + 2 * call["padding"][i] - reach - 1) // call["stride"][i] + 1
