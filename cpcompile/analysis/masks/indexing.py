"""The rules of views, slices and indices: every element of the result is one of the operand, at other coordinates."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.expression import (
    ONE,
    ZERO,
    Affine,
    Atom,
    Coordinate,
    Expression,
    Quotient,
    affine,
    coordinate,
    is_natural,
    quotient,
)
from cpcompile.analysis.masks.operands import INDEX_DTYPES, number_of, result_of
from cpcompile.analysis.masks.read import Reader, Unreadable, is_size_one, reads, reads_item, size_of
from cpcompile.analysis.masks.simplify import assuming, compare, rewrite, shifted, substitute
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


@reads(
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
def regroup(reader: Reader, call: Call) -> Expression:
    """Dims of size 1 come and go, others are merged or split, where the sizes of all but the first of them are numbers."""
    _, source = next(call.operands())
    moves: dict[int, Affine] = {}
    for old, new in matching_dims(wide_dims(value_of(source)), wide_dims(value_of(call.node))):
        merged = Affine()
        for (dim, _), stride in zip(new, strides(new), strict=True):
            merged += coordinate(dim) * stride
        for (dim, size), stride in zip(old, strides(old), strict=True):
            index = quotient(merged, stride)
            moves[dim] = index if dim == old[0][0] else index - quotient(index, size) * size
    return without_small_quotients(substitute(reader.operand(source), moves), result_of(call).shape)


Dims = list[tuple[int, Any]]


def matching_dims(old: Dims, new: Dims) -> Iterator[tuple[Dims, Dims]]:
    """Yield the dims before and after a view that hold the same elements, one of either side."""
    while old and new:
        few = [(1, 1), *((n, 1) for n in range(2, len(old) + 1)), *((1, n) for n in range(2, len(new) + 1))]
        for a, b in few:
            are_numbers = all(isinstance(size, int) for _, size in (*old[1:a], *new[1:b]))
            sizes = (math.prod(size for _, size in dims) for dims in (old[:a], new[:b]))
            if are_numbers and statically_known_true(operator.eq(*sizes)):
                yield old[:a], new[:b]
                old, new = old[a:], new[b:]
                break
        else:
            raise Unreadable
    if old or new:
        raise Unreadable


def strides(dims: Dims) -> list[int]:
    """Return how many elements each of the dims steps over."""
    return [math.prod(size for _, size in dims[i + 1 :]) for i in range(len(dims))]


def without_small_quotients(value: Expression, shape: Sequence[Any]) -> Expression:
    """Return the expression without quotients of coordinates that stay below the divisor."""

    def rounded(atom: Atom) -> Affine:
        if not isinstance(atom, Quotient) or not is_natural(atom.value):
            return affine(atom)
        largest = atom.value.constant
        for inner, factor in atom.value.terms:
            size = shape[inner.dim] if isinstance(inner, Coordinate) else None
            if not isinstance(size, int):
                return affine(atom)
            largest += factor * (size - 1)
        return ZERO if largest < atom.divisor else affine(atom)

    return rewrite(value, rounded)


def wide_dims(tensor: torch.Tensor) -> Dims:
    """Return (dim, size) of the dims that are not known to have size 1."""
    return [(dim, size) for dim, size in enumerate(tensor.shape) if not is_size_one(size)]


@reads(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def expand(reader: Reader, call: Call) -> Expression:
    return reader.operand(call["self"], result_of(call).dim())


@reads(
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.movedim.int,
    aten.movedim.intlist,
)
def permute(reader: Reader, call: Call) -> Expression:
    """The order of dims is that of the strides' numbers: what the operator does to a tensor of that rank."""
    rank = result_of(call).dim()
    numbered = torch.empty([1] * rank).as_strided([1] * rank, list(range(rank)))
    others = [call[name] for name in list(call.arguments)[1:]]
    order = call.target(numbered, *others).stride()
    return substitute(reader.operand(call["self"]), {old: coordinate(new) for new, old in enumerate(order)})


@reads_item(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(reader: Reader, call: Call, index: int) -> Expression:
    """Each result grows along a dim of its own; with `xy` the first two change places."""
    dim = 1 - index if call.arguments.get("indexing") == "xy" and index < 2 < 1 + len(call["tensors"]) else index
    return substitute(reader.operand(call["tensors"][index]), {0: coordinate(dim)})


@reads(aten.repeat.default, aten.tile.default)
def repeat(reader: Reader, call: Call) -> Expression:
    """Repeated are only dims of size 1, and those that are new."""
    source, result = value_of(call["self"]), result_of(call)
    new = result.dim() - source.dim()
    for size, now in zip(source.shape, result.shape[new:], strict=True):
        if not is_size_one(size) and not statically_known_true(size == now):
            raise Unreadable
    return shifted(reader.operand(call["self"]), new)


@reads(aten.repeat_interleave.self_int)
def repeat_interleave(reader: Reader, call: Call) -> Expression:
    """Repeated is a dim of size 1."""
    if call["dim"] is None or not is_size_one(call.shape("self")[call.dim("dim", "self")]):
        raise Unreadable
    return reader.operand(call["self"])


@reads(aten.flip.default)
def flip(reader: Reader, call: Call) -> Expression:
    dims = [dim % result_of(call).dim() for dim in call["dims"]]
    moves = {dim: size_of(call.shape("self")[dim]) - coordinate(dim) - ONE for dim in dims}
    return substitute(reader.operand(call["self"]), moves)


@reads(aten.slice.Tensor)
def slice_(reader: Reader, call: Call) -> Expression:
    dim = call.dim("dim", "self")
    start = first_index(reader, call, dim)
    value = substitute(reader.operand(call["self"]), {dim: start + coordinate(dim) * call["step"]})
    return assuming(compare("le", coordinate(dim) + ONE - size_of(result_of(call).shape[dim])), value)


def first_index(reader: Reader, call: Call, dim: int) -> Affine:
    """Return the start of a slice, counted from the front."""
    index, size = call["start"] or 0, call.shape("self")[dim]
    if isinstance(index, int) and isinstance(size, int):
        return Affine(index if index >= 0 else max(index + size, 0))
    start = number_of(reader, index)
    value = value_of(index) if isinstance(index, fx.Node) else index
    if is_natural(start) or statically_known_true(value >= 0):
        return start
    if call["step"] == 1 and call["end"] in (None, sys.maxsize):
        return size_of(size) - size_of(result_of(call).shape[dim])
    raise Unreadable


@reads(aten.select.int)
def select(reader: Reader, call: Call) -> Expression:
    dim, size = call.dim("dim", "self"), call.shape("self")[call.dim("dim", "self")]
    index = number_of(reader, call["index"])
    if isinstance(call["index"], int) and call["index"] < 0:
        index += size_of(size)
    moves = {d: coordinate(d - 1) for d in range(dim + 1, len(call.shape("self")))}
    return substitute(reader.operand(call["self"]), {**moves, dim: index})


@reads(aten.index.Tensor)
def index(reader: Reader, call: Call) -> Expression:
    """Neighbouring dims are indexed by integers that cannot be negative."""
    indices = [i for i in call["indices"] if i is not None]
    first = next(dim for dim, i in enumerate(call["indices"]) if i is not None)
    if call["indices"][first : first + len(indices)] != indices or not all(is_readable_index(i) for i in indices):
        raise Unreadable
    rank = max(value_of(i).dim() for i in indices)
    moves = {}
    for dim, i in enumerate(indices, first):
        value = reader.operand(i, rank)
        if not isinstance(value, Affine) or not is_natural(value):
            raise Unreadable
        moves[dim] = as_affine(shifted(value, first))
    for dim in range(first + len(indices), len(call.shape("self"))):
        moves[dim] = coordinate(dim - len(indices) + rank)
    return substitute(reader.operand(call["self"]), moves)


def is_readable_index(node: fx.Node) -> bool:
    """Tell whether a tensor indexes by integers; booleans select."""
    return value_of(node).dtype in INDEX_DTYPES


def as_affine(value: Expression) -> Affine:
    """Return an integer."""
    assert isinstance(value, Affine)
    return value
