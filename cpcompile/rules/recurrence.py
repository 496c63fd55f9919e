"""Linear recurrences along the tokens: ranks pass on states, whose size does not depend on how many tokens there are.

[.. t ..] -> [.. chunks c ..]; each chunk by itself from a state of 0, and with it what becomes of a state that comes from before:
the product of its factors. The last of both, of all chunks, say what each chunk begins with.
Slots behind the last token hold its state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.over_tokens import filled, masked, outside_of
from cpcompile.rules.pointwise import aligned
from cpcompile.rules.registry import Decision, Indices, Lowering, Names, rule
from cpcompile.rules.scan import behind, in_chunks, in_order, of_own_chunks, with_own_before

aten, cp = torch.ops.aten, torch.ops.cpcompile


@rule(cp.recurrence.default)
def recurrence(call: Call) -> Indices:
    """[... t ...], [... t ...] -> [... t ...], closed along t; matrices [... k k], [... k v] -> [... k v], closed along k"""
    shape = call.shape("x")
    closed = {call.dim("dim", "x"), *([len(shape) - 2] if call["by_matrix"] else [])}

    def names(operand: str) -> Names:
        found = aligned(call.shape(operand), shape)
        return tuple(None if dim in closed else name for dim, name in enumerate(found))

    factor = (*names("factor")[:-1], None) if call["by_matrix"] else names("factor")
    return Indices({"factor": factor, "x": names("x")}, (names("x"),))


@along_tokens(cp.recurrence.default)
def along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """each rank computes its chunks from a state of 0 and the product of their factors; the last ones go to all ranks"""
    at, by_matrix = next(iter(operands.values())), bool(call["by_matrix"])
    is_along = at.dim == call.dim("dim", "x") and set(operands.values()) == {at}
    if not is_along or at.reaches_outside or not holds_tokens_only(call, "x", at, length):
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        dim, is_last, given = at.dim, at.dim == len(call.shape("x")) - 1, writer.call["x"]
        factor, x = kept(writer, at, writer.call["factor"], by_matrix), masked(writer, at, given, 0.0)
        factor, x = (in_chunks(writer, tensor, dim) for tensor in (factor, x))
        if is_last:
            factor, x = (writer.insert(aten.unsqueeze.default, tensor, -1) for tensor in (factor, x))
        width = x.meta["val"].shape[-1]
        is_for_all = by_matrix or factor.meta["val"].shape[-1] == 1  # one factor for all columns of a state
        steps = factor if is_for_all else writer.insert(aten.cat.default, [factor, factor], -1)
        both = writer.insert(aten.cat.default, [x, first_factor(writer, factor, x, dim + 1)], -1)
        both = writer.insert(cp.recurrence.default, steps, both, dim + 1, by_matrix)
        ends = in_order(writer, writer.insert(aten.select.int, both, dim + 1, -1), dim)
        states, product = columns(writer, both, width)
        ends, products = columns(writer, ends, width)
        ends = writer.insert(cp.recurrence.default, products, ends, dim, by_matrix)
        begin = of_own_chunks(writer, behind(writer, ends, dim, 0), dim)
        passed = writer.insert(aten.matmul.default if by_matrix else aten.mul.Tensor, product, begin)
        result = writer.insert(aten.add.Tensor, states, passed)
        if is_last:
            result = writer.insert(aten.squeeze.dim, result, -1)
        result = writer.insert(aten.flatten.using_ints, result, dim, dim + 1)
        return [with_own_before(writer, at, result, given)]

    return Decision({"factor": at, "x": at}, (at,), lower=lower)


def kept(writer: Lowering, at: Sharded, factor: fx.Node, by_matrix: bool) -> fx.Node:
    """Return factors that change nothing in slots that hold no token of the range."""
    is_outside = outside_of(writer, at, factor)
    if is_outside is None or not by_matrix:
        return filled(writer, factor, is_outside, 1.0)
    ones = writer.insert(aten.new_ones.default, factor, [factor.meta["val"].shape[-1]])
    return writer.insert(aten.where.self, is_outside, writer.insert(aten.diag_embed.default, ones), factor)


def first_factor(writer: Lowering, factor: fx.Node, x: fx.Node, dim: int) -> fx.Node:
    """Return the first factor along a dim, for each row of `x`, and zeros behind it: their recurrence are the products."""
    zeros = writer.insert(aten.zeros_like.default, writer.insert(aten.slice.Tensor, x, -1, 0, 1))
    every = writer.insert(aten.add.Tensor, factor, zeros)
    first, others = (writer.insert(aten.slice.Tensor, every, dim, *cut) for cut in ((0, 1), (1,)))
    return writer.insert(aten.cat.default, [first, writer.insert(aten.zeros_like.default, others)], dim)


def columns(writer: Lowering, x: fx.Node, width: Any) -> tuple[fx.Node, fx.Node]:
    """Return the first `width` columns, and the others."""
    first, others = (writer.insert(aten.slice.Tensor, x, -1, *cut) for cut in ((0, width), (width,)))
    return first, others
