"""What reductions over the tokens share that are no plain sums: each rank reduces its own, then the ranks combine.

Slots that hold no token of the range are filled with what changes nothing. The sharded dim may hold more than tokens
(`outer * tokens * inner`): it is reduced as a whole, so that only indices depend on the order.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import keep_source
from cpcompile.ir.operator_call import Call, expression, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.ir.resharding import Resharder, Writer
from cpcompile.rules.along_tokens import before_end
from cpcompile.rules.registry import Lowering
from cpcompile.rules.views import quotient

aten, cp = torch.ops.aten, torch.ops.cpcompile
NO_TOKEN = sys.maxsize


def indices(writer: Lowering, at: Sharded, x: fx.Node) -> fx.Node:
    """Return the index of each local element along the sharded dim of the whole tensor; `NO_TOKEN` outside the range."""
    outer = outer_of(writer, at, x)
    position = writer.insert(cp.positions.default, x, writer.length, *writer.axis)
    index = writer.insert(aten.sub.Tensor, position, at.front)
    count = before_end(writer, at.front + at.back)
    is_outside = writer.insert(
        aten.logical_or.default, writer.insert(aten.lt.Scalar, index, 0), writer.insert(aten.ge.Scalar, index, count)
    )
    index = writer.insert(aten.view.default, index, [-1, 1])
    is_outside = writer.insert(aten.view.default, is_outside, [-1, 1])
    if at.inner != 1:
        within = counted(writer, x, at.inner)
        index = writer.insert(aten.add.Tensor, writer.insert(aten.mul.Tensor, index, at.inner), within)
    if outer != 1:
        before = counted(writer, x, outer)
        size = count * at.inner if isinstance(count, int) else writer.insert(operator.mul, count, at.inner)
        before = writer.insert(aten.view.default, writer.insert(aten.mul.Tensor, before, size), [-1, 1, 1])
        index = writer.insert(aten.add.Tensor, index, before)
    index = writer.insert(aten.masked_fill.Scalar, index, is_outside, NO_TOKEN)
    behind = [1] * (x.meta["val"].dim() - at.dim - 1)
    return writer.insert(aten.view.default, index, [-1, *behind])


def counted(writer: Lowering, like: fx.Node, number: fx.Node | int) -> fx.Node:
    """Return 0, 1, ..., `number` - 1."""
    ones = writer.insert(aten.new_ones.default, like, [number], dtype=torch.int64)
    return writer.insert(aten.sub.Tensor, writer.insert(aten.cumsum.default, ones, 0), 1)


def outer_of(writer: Lowering, at: Sharded, x: fx.Node) -> fx.Node | int:
    """Return how often the sharded dim of `x` holds all tokens."""
    local: Any = writer.local
    tokens: Any = writer.local if annotation(x).is_local else writer.length
    tokens = tokens.meta["val"] if isinstance(tokens, fx.Node) else tokens
    tokens = tokens if annotation(x).is_local else at.count(tokens)
    outer = quotient(expression(x.meta["val"].shape[at.dim]), expression(tokens) * at.inner)
    if outer is not None and outer.is_Integer:
        return int(outer)
    slots = local * at.inner if isinstance(local, int) else writer.insert(operator.mul, local, at.inner)
    return writer.insert(operator.floordiv, writer.insert(aten.sym_size.int, x, at.dim), slots)


def outside_of(writer: Lowering, at: Sharded, x: fx.Node) -> fx.Node | None:
    """Return which slots of `x` hold no token of the range, broadcast to its shape; None if there are none."""
    if every_slot_counts(writer, at):
        return None
    return writer.insert(aten.eq.Scalar, indices(writer, at, x), NO_TOKEN)


def filled(writer: Lowering, x: fx.Node, is_outside: fx.Node | None, value: float | int) -> fx.Node:
    """Return `x` with `value` where it holds no token of the range."""
    return x if is_outside is None else writer.insert(aten.masked_fill.Scalar, x, is_outside, value)


def masked(writer: Lowering, at: Sharded, x: fx.Node, value: float | int) -> fx.Node:
    """Return `x` with `value` in the slots that hold no token of the range."""
    return filled(writer, x, outside_of(writer, at, x), value)


def with_number(resharder: Resharder, x: fx.Node, reader: Call, number: float) -> fx.Node:
    """Write `x`, for a call that reads it, with a number in the slots that hold no token."""
    at = placement_of(x)
    assert isinstance(at, Sharded)
    if resharder.lengths(at).parts:
        return resharder.fill_padding(x, at, number, reader.node)
    # Not fill_padding, which copies: this fuses with what reads it.
    filled = masked(Writer(resharder, reader, at), at, x, number)
    return filled if filled is x else as_value_of(filled, x)


def as_value_of(filled: fx.Node, x: fx.Node) -> fx.Node:
    """Return a node that was written in the place of `x`, annotated as that is."""
    keep_source(filled, x)
    filled.meta["val"] = value_of(x)
    annotate(filled, placement=placement_of(x), origin=annotation(x).origin, is_local=False)
    return filled


def every_slot_counts(writer: Lowering, at: Sharded) -> bool:
    """Tell whether every slot holds a token of the range, as far as is known when compiling."""
    return not writer.has_padding and at.covers_all


def all_reduce(writer: Lowering, x: fx.Node) -> fx.Node:
    """Return the sum over the ranks."""
    _, world_size, group, *_ = writer.axis
    return writer.insert(cp.all_reduce.default, x, world_size, group)


def stacked(writer: Lowering, x: fx.Node) -> fx.Node:
    """Return what each rank has, stacked in front."""
    _, world_size, group, *_ = writer.axis
    return writer.insert(cp.stack_ranks.default, x, world_size, group)


def lowest(dtype: torch.dtype) -> float | int:
    """Return the number below all others."""
    if dtype.is_floating_point:
        return -float("inf")
    return 0 if dtype == torch.bool else torch.iinfo(dtype).min


def highest(dtype: torch.dtype) -> float | int:
    """Return the number above all others."""
    if dtype.is_floating_point:
        return float("inf")
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def reduced(operands: Mapping[str, Sharded], dims: set[int]) -> Sharded | None:
    """Return where the tokens are, if the operator runs over them and knows them all."""
    at = operands.get("self")
    return None if at is None or at.dim not in dims or at.reaches_outside else at


def whole_count(writer: Lowering, at: Sharded, x: fx.Node, dims: Iterable[int]) -> fx.Node | int:
    """Return the product of the sizes that `dims` have in the whole tensor, of which `x` holds the local tokens."""
    product: Any = 1
    for dim in dims:
        size = x.meta["val"].shape[dim]
        if dim == at.dim:
            factors = [outer_of(writer, at, x), before_end(writer, at.front + at.back), at.inner]
        else:
            factors = [size if isinstance(size, int) else writer.insert(aten.sym_size.int, x, dim)]
        for factor in factors:
            both_known = isinstance(product, int) and isinstance(factor, int)
            product = product * factor if both_known else writer.insert(operator.mul, product, factor)
    return product  # type: ignore[no-any-return]


def widened(writer: Lowering, x: fx.Node, dtype: torch.dtype | None = None) -> fx.Node:
    """Return `x` in `dtype`, if one is asked for, and in half precision as float32: several steps round as often."""
    wanted = dtype or x.meta["val"].dtype
    wanted = torch.float32 if wanted in (torch.float16, torch.bfloat16) else wanted
    return cast(writer, x, wanted)


def cast(writer: Lowering, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return `x` in `dtype`."""
    return x if x.meta["val"].dtype == dtype else writer.insert(aten.to.dtype, x, dtype)


def square_root(writer: Lowering, x: fx.Node) -> fx.Node:
    """Return the square root, whose gradient at 0 is 0 here, as it is in deviations and norms."""
    is_zero = writer.insert(aten.eq.Scalar, x, 0)
    root = writer.insert(aten.sqrt.default, writer.insert(aten.masked_fill.Scalar, x, is_zero, 1))
    return writer.insert(aten.masked_fill.Scalar, root, is_zero, 0)
