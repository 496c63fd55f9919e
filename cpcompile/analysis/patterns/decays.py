"""Decays: a product with all sums of decays between two places is a linear recurrence over these places.

    M[t, s] = exp(a[s + 1] + ... + a[t]) for s <= t, 0 elsewhere;   y = M @ x   is   y[t] = exp(a[t]) y[t - 1] + x[t]

Chunks of Mamba-2 pass on their states so. The sums are written as one cumulative sum for each column, or as differences of one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.masks.expression import ONE, Boolean, coordinate
from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.masks.simplify import as_boolean, compare, negated
from cpcompile.analysis.patterns.fills import Fill, fills_of
from cpcompile.analysis.patterns.nodes import PADS, same_shape, source, switches_mode
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import JOINS, Call, is_tensor, value_of

aten, cp = torch.ops.aten, torch.ops.cpcompile

_SAME = {aten.alias.default, aten.clone.default, aten.contiguous.default, aten.expand.default}
_TURNS = {aten.transpose.int, aten.permute.default}


def recurrence_of_product(node: fx.Node, reader: Reader) -> fx.Node | None:
    """Return, written before a product of matrices, the recurrence that it is; None if it is none.

    Args:
        node: a call of `matmul` or `bmm`.
    """
    call = Call.of(node)
    weights, x = list(call.arguments.values())[:2]
    turns, decays = turned_decays(weights, reader)
    if decays is None or not same_shape(value_of(x).shape, value_of(node).shape):
        return None
    if value_of(x).dtype != value_of(node).dtype or switches_mode(min(decays, x), node):
        return None
    rank = value_of(x).dim()
    is_late = is_padded_in_front(decays) and begins_with_zeros(x, rank - 2, reader)
    if is_late:
        decays, x = source(decays), insert_call(node, aten.slice.Tensor, x, rank - 2, 1)
    factor = insert_call(node, aten.unsqueeze.default, insert_call(node, aten.exp.default, decays), -1)
    for turn in turns:
        factor = insert_call(node, turn.target, factor, *turn.args[1:])  # type: ignore[arg-type]
    states = insert_call(node, cp.recurrence.default, factor, x, rank - 2, False)
    return insert_call(node, aten.constant_pad_nd.default, states, [0, 0, 1, 0]) if is_late else states


def turned_decays(weights: fx.Node, reader: Reader) -> tuple[list[fx.Node], fx.Node | None]:
    """Return how the exponentials of all sums of decays are turned to be `weights`, in order, and the decays `[..., t]`."""
    turns: list[fx.Node] = []
    rank, node = value_of(weights).dim(), weights
    order = list(range(rank))  # where the dims of `weights` are in `node`
    while node.target in _SAME - {aten.expand.default} | _TURNS:
        if node.target in _TURNS:
            turns.insert(0, node)
            dims = turned(node)
            order = [dims[d] for d in order]
        node = source(node)
    if node.target is not aten.exp.default or order[-2:] != [rank - 2, rank - 1]:
        return turns, None
    return turns, decays_of_sums(source(node), reader)


def turned(node: fx.Node) -> list[int]:
    """Return, for each dim of a transpose or a permutation, which one of its operand it is."""
    call, dims = Call.of(node), list(range(value_of(node).dim()))
    if node.target is aten.permute.default:
        return [int(d) % len(dims) for d in call["dims"]]
    a, b = call.dim("dim0", "self"), call.dim("dim1", "self")
    dims[a], dims[b] = dims[b], dims[a]
    return dims


def decays_of_sums(sums: fx.Node, reader: Reader) -> fx.Node | None:
    """Return the decays `[..., t]` of which a tensor `[..., t, s]` has the sums from s + 1 to t, and minus infinity for s > t."""
    for fill in fills_of(sums, reader):
        if fill.value == -float("inf") and is_filled(fill, reader, lambda row, column: row - column + ONE):
            found = summed_by_column(fill.inner, reader) or summed_once(fill.inner)
            if found is not None:
                return found
    return None


def is_filled(fill: Fill, reader: Reader, least: Callable[[Any, Any], Any]) -> bool:
    """Tell whether exactly those places of a matrix are filled at which `least` of row and column is at most 0."""
    rank = value_of(fill.condition).dim()
    if rank < 2:
        return False
    condition = reader.read(fill.condition)
    if condition is None:
        return False
    filled: Boolean = as_boolean(condition)
    wanted = compare("le", least(coordinate(rank - 2), coordinate(rank - 1)))
    return (filled if fill.where else negated(filled)) == wanted


def summed_by_column(sums: fx.Node, reader: Reader) -> fx.Node | None:
    """Return `a` of a cumulative sum along the rows of `a[..., :, None]`, filled with 0 above its diagonal and on it."""
    rank = value_of(sums).dim()
    if sums.target is not aten.cumsum.default or Call.of(sums).dim("dim", "self") != rank - 2:
        return None
    for fill in fills_of(source(sums), reader):
        if fill.value == 0 and is_filled(fill, reader, lambda row, column: row - column):
            return without_dim(fill.inner, rank - 1)
    return None


def summed_once(sums: fx.Node) -> fx.Node | None:
    """Return `a` of `c[..., :, None] - c[..., None, :]`, where c is its cumulative sum."""
    if sums.target is not aten.sub.Tensor or Call.of(sums)["alpha"] != 1 or not all(map(is_tensor, sums.args[:2])):
        return None
    rank = value_of(sums).dim()
    rows, columns = (without_dim(x, dim) for x, dim in zip(sums.args[:2], (rank - 1, rank - 2), strict=True))  # type: ignore[arg-type]
    is_sum = rows is not None and rows is columns and rows.target is aten.cumsum.default
    return source(rows) if is_sum and rows is not None and Call.of(rows).dim("dim", "self") == rank - 2 else None


def without_dim(x: fx.Node, dim: int) -> fx.Node | None:
    """Return what a tensor is broadcast from along a dim that was inserted for that."""
    while x.target in _SAME:
        x = source(x)
    is_inserted = x.target is aten.unsqueeze.default and int(Call.of(x)["dim"]) % value_of(x).dim() == dim
    return source(x) if is_inserted else None


def is_padded_in_front(x: fx.Node) -> bool:
    """Tell whether a tensor has one element, which counts for nothing, before the others along its last dim."""
    return x.target in PADS and list(Call.of(x)["pad"]) == [1, 0]


def begins_with_zeros(x: fx.Node, dim: int, reader: Reader) -> bool:
    """Tell whether the first element along a dim is known to be 0, for all indices of the other dims."""
    while x.op == "call_function" and isinstance(x.target, torch._ops.OpOverload):
        call = Call.of(x)
        if x.target in _TURNS:
            dim = turned(x)[dim]
        elif x.target is aten.flatten.using_ints and call.dim("start_dim", "self") <= dim:
            return False
        elif x.target in JOINS and call.dim("dim", "tensors.0") == dim:
            first = call["tensors"][0]
            return value_of(first).shape[dim] == 1 and constant(reader, first) == 0
        elif x.target in PADS:
            pads = list(call["pad"])[2 * (value_of(x).dim() - 1 - dim) :]
            return (
                bool(pads)
                and pads[0] == 1
                and not call["value"]
                and call.arguments.get("mode", "constant") == "constant"
            )
        elif x.target not in _SAME - {aten.expand.default} | {aten.flatten.using_ints}:
            return False
        x = source(x)
    return False
