"""Masked scatter: the marked elements take the elements of a source, one after the other; images are put among words so.

before  x = aten.masked_scatter(x, mask, images)                                   # x: Sharded(1) of [B, S, D]
after   number = cumsum(mask [B, S] of all tokens) * mask                          # 1, 2, ... where it is marked, else 0
        own = cp.shard_tokens(number, 1)
        x = where(own > 0, [0, *images.reshape(-1, D)][own], x)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.operator_call import Call, expression, value_of
from cpcompile.ir.placement import FULL, Full, Placement, Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.registry import Decision, Indices, Lowering, rule
from cpcompile.rules.views import quotient

aten, cp = torch.ops.aten, torch.ops.cpcompile

# What repeats a mask or moves it, and says nothing new.
REPEATS = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
}


@rule(aten.masked_scatter.default)
def masked_scatter(call: Call) -> Indices:
    """[...], [...], [n] -> [...], closed"""
    operands = {name: (None,) * len(call.shape(name)) for name, _ in call.operands()}
    return Indices(operands, ((None,) * len(call.result.shape),))


@along_tokens(aten.masked_scatter.default)
def scatter_by_number(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """the marked elements of all tokens are numbered, and each rank takes those of its own"""
    at = operands.get("self")
    if at is None or not at.covers_all or "source" in operands:
        return None
    shape = call.shape("self")
    outer = quotient(expression(shape[at.dim]), expression(length))
    if at.inner != 1 or outer is None or not outer.is_Integer:
        return None
    mask = without_repeats(call["mask"])
    sharded = placement_of(mask)
    if list(map(expression, shape)) != list(map(expression, call.result.shape)) or not is_alike(mask, shape, at):
        return None
    num_same = num_alike(value_of(mask).shape, shape, at.dim)
    row = math.prod(shape[len(shape) - num_same :])
    count = math.prod(map(expression, call.shape("source")))
    if not isinstance(row, int) or quotient(count, expression(row)) is None:
        num_same, row = 0, 1

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x, source, marks = writer.call["self"], writer.call["source"], mask
        if isinstance(sharded, Sharded):
            marks = writer.insert(aten.to.dtype, marks, torch.uint8)
            marks = writer.insert(cp.gather_tokens.default, marks, sharded.dim, 1, writer.length, *writer.axis)
            annotate(marks, reason="the marked elements of all tokens are counted")
        number = numbered(writer, marks, at, int(outer), num_same)
        own = writer.insert(cp.shard_tokens.default, number, at.dim, 1, writer.length, *writer.axis)
        rows = writer.insert(aten.reshape.default, source, [-1, row] if num_same else [-1])
        rows = writer.insert(aten.constant_pad_nd.default, rows, [0, 0, 1, 0] if num_same else [1, 0])
        taken = writer.insert(aten.index.Tensor, rows, [own])
        is_marked = writer.insert(aten.gt.Scalar, own, 0)
        for _ in range(num_same):
            is_marked = writer.insert(aten.unsqueeze.default, is_marked, -1)
        if num_same > 1:
            taken = writer.insert(aten.unflatten.int, taken, -1, list(shape[len(shape) - num_same :]))
        return [writer.insert(aten.where.self, is_marked, taken, x)]

    wanted: dict[str, Placement] = {"self": at, "source": FULL}
    if "mask" not in operands:
        wanted["mask"] = FULL
    return Decision(wanted, (at,), lower=lower)


def without_repeats(mask: fx.Node) -> fx.Node:
    """Return the smallest mask that is repeated to be this one."""
    while mask.target in REPEATS:
        repeated = mask.args[0]
        assert isinstance(repeated, fx.Node)
        if value_of(repeated).dtype != torch.bool or annotation(repeated).is_local:
            break
        mask = repeated
    return mask


def is_alike(mask: fx.Node, shape: Sequence[Any], at: Sharded) -> bool:
    """Tell whether a mask is whole, or holds the same tokens as a tensor of this shape, and its elements are marks."""
    held, value = placement_of(mask), value_of(mask)
    if value.dtype != torch.bool:
        return False
    if isinstance(held, Full):
        return True
    is_same_dim = isinstance(held, Sharded) and held.dim - value.dim() == at.dim - len(shape)
    return is_same_dim and (held.inner, held.sequence, held.covers_all) == (1, at.sequence, True)  # type: ignore[union-attr]


def num_alike(mask: Sequence[Any], shape: Sequence[Any], dim: int) -> int:
    """Return along how many last dims, behind the one of the tokens, a mask of the sizes `mask` is the same."""
    count = 0
    while count < min(len(mask), len(shape) - dim - 1) and expression(mask[len(mask) - 1 - count]) == 1:
        count += 1
    return count


def numbered(writer: Lowering, marks: fx.Node, at: Sharded, outer: int, num_same: int) -> fx.Node:
    """Return 1, 2, ... where a whole mask is set, in order, and 0 elsewhere, without the dims where it is the same.

    The dim of the tokens holds all of them `outer` times.
    """
    shape = writer.call.shape("self")
    for _ in range(num_same):
        marks = writer.insert(aten.squeeze.dim, marks, -1)
    sizes: list[Any] = []
    for dim, size in enumerate(shape[: len(shape) - num_same]):
        is_given = isinstance(size, int)
        sizes.append(size if is_given else writer.insert(aten.sym_size.int, writer.call["self"], dim))
    length = writer.length
    sizes[at.dim] = length * outer if isinstance(length, int) else writer.insert(operator.mul, length, outer)
    marks = writer.insert(aten.expand.default, marks, sizes)
    count = writer.insert(aten.cumsum.default, writer.insert(aten.reshape.default, marks, [-1]), 0)
    return writer.insert(aten.mul.Tensor, writer.insert(aten.reshape.default, count, sizes), marks)
