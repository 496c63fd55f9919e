"""Open skewed rows: a relative shift by views, which moves elements to other places of their rows, becomes a gather in rows.

before  x = aten.view(aten.pad(scores, [1, 0]), [B, H, S + 1, S]); y = aten.view(aten.slice(x, 2, 1), [B, H, S, S])
after   at = aten.arange(S) - aten.arange(S)[:, None] + S                    # y[i, j] is element at[i, j] of row i, or on
        y = aten.where(at < S + 1, aten.gather(padded, -1, at), aten.gather(next_row(padded), -1, at - (S + 1)))

Read as one long row, the elements keep their order; only rows get another width. So that a rank has what its rows are made of
but for those of their neighbours, a view that would move all of them is left out. Transformer-XL, XLNet, Conformer and Music
Transformer write their relative positions so, VITS with zeros in front of the long row or behind it.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.patterns.formula import coordinate, size_of
from cpcompile.analysis.patterns.nodes import PADS, same_shape, source
from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

_VIEWS = {
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default),
}


@dataclass(frozen=True, slots=True)
class Term:
    """A number of elements: so many rows, a number or a node of one, of so many elements, to be added or taken away."""

    sign: int
    count: Any
    width: Any

    @property
    def value(self) -> Any:
        """The number, perhaps a symbolic one."""
        return self.sign * number_of(self.count) * self.width


@dataclass(frozen=True, slots=True)
class Skew:
    """`end` `[..., rows, width + step]` holds what `rows` `[..., rows, width]` does from an `offset` on, zeros outside."""

    rows: fx.Node
    end: fx.Node
    step: int
    offset: tuple[Term, ...]


def open_skewed_rows(gm: fx.GraphModule) -> int:
    """Return how many relative shifts became gathers.

    Needs: no operator writes (`functionalise_writes`).
    Gives: scores whose rows stay where they are.
    """
    count = 0
    for node in list(gm.graph.nodes):
        skew = read_skew(node)
        if skew is not None and (new := gathered(skew)) is not None:
            replace_uses(last_columns(node), new)
            count += 1
    return count


def read_skew(end: fx.Node) -> Skew | None:
    """Read views, slices and zeros along one long row, of which `end` is the last."""
    if not is_step(end, num_batch := value_dim(end) - 2) or any(is_step(user, num_batch) for user in end.users):
        return None
    node, num_views, offset = end, 0, []
    while is_step(node, num_batch):
        call, width = Call.of(node), math.prod(value_of(source(node)).shape[num_batch + 1 :])
        num_views += node.target in _VIEWS
        if node.target is aten.slice.Tensor:
            offset.append(Term(1, call["start"] or 0, width))
        elif node.target in PADS:
            offset.append(Term(-1, call["pad"][-2], width))
        node = source(node)
    if not num_views or value_dim(node) != num_batch + 2:
        return None
    (rows, width), (new_rows, new_width) = (value_of(x).shape[-2:] for x in (node, end))
    for step in (-1, 1):
        if statically_known_true(new_width == width + step) and statically_known_true(rows == new_rows):
            return Skew(node, end, step, tuple(term for term in offset if term.count != 0))
    return None


def value_dim(node: fx.Node) -> int:
    """Return how many dims a node has, 0 for what is no tensor."""
    value = value_of(node)
    return value.dim() if isinstance(value, torch.Tensor) else 0


def is_step(node: fx.Node, num_batch: int) -> bool:
    """Tell whether a node keeps the order of the elements behind the batch dims, and leaves out or adds some at the ends."""
    if node.op != "call_function" or num_batch < 0 or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target not in _VIEWS | PADS | {aten.slice.Tensor}:
        return False
    before, after = value_of(source(node)), value_of(node)
    if min(before.dim(), after.dim()) <= num_batch or not same_shape(before.shape[:num_batch], after.shape[:num_batch]):
        return False
    call = Call.of(node)
    if node.target is aten.slice.Tensor:
        return call.dim("dim", "self") == num_batch and call["step"] == 1 and first_of(call) is not None
    if node.target in PADS:
        *inner, _, _ = call["pad"]
        is_of_zeros = not call["value"] and call.arguments.get("mode", "constant") == "constant"
        return is_of_zeros and len(call["pad"]) == 2 * (before.dim() - num_batch) and not any(inner)
    return True


def first_of(call: Call) -> Any:
    """Return where a slice begins, None if that is counted from the end."""
    start = number_of(call["start"] or 0)
    return start if statically_known_true(start >= 0) else None


def number_of(argument: Any) -> Any:
    """Return a number, perhaps a symbolic one, of an argument."""
    return value_of(argument) if isinstance(argument, fx.Node) else argument


def last_columns(end: fx.Node) -> fx.Node:
    """Return the slice of the columns in which alone a node is used, or the node."""
    (user, *others) = end.users or (end,)
    is_slice = not others and user.target is aten.slice.Tensor and user.args[0] is end
    is_of_columns = is_slice and Call.of(user).dim("dim", "self") == value_dim(end) - 1 and Call.of(user)["step"] == 1
    return user if is_of_columns and first_of(Call.of(user)) is not None else end


def gathered(skew: Skew) -> fx.Node | None:
    """Return the gather that computes a skew, inserted before the last node of it; None if rows come from further away."""
    taken = last_columns(skew.end)
    first = 0 if taken is skew.end else Call.of(taken)["start"] or 0
    (rows, width), columns = value_of(skew.rows).shape[-2:], value_of(taken).shape[-1]
    offset = sum((term.value for term in skew.offset), start=number_of(first))
    least, most = (
        (offset - (rows - 1), offset + columns - 1) if skew.step < 0 else (offset, offset + rows + columns - 2)
    )
    if not (statically_known_true(least >= -width) and statically_known_true(most < 2 * width)):
        return None
    shifts = [0, *[-1] * (not statically_known_true(least >= 0)), *[1] * (not statically_known_true(most < width))]
    num_columns = column_count(skew, taken, first)
    distances = [distance(skew, taken, term) for term in skew.offset]
    if num_columns is None or any(found is None for found in distances):
        return None
    shape = [size_of(taken, skew.rows, dim) for dim in range(value_dim(skew.rows))]
    places = places_in_rows(skew, taken, [*distances, first], num_columns)
    result = None
    for shift in shifts:
        moved = insert_call(taken, aten.sub.Tensor, places, product(taken, shift, shape[-1])) if shift else places
        column = insert_call(taken, aten.clamp.default, moved, 0, plus(taken, shape[-1], -1))
        column = insert_call(taken, aten.expand.default, column, [*shape[:-1], num_columns])
        found = insert_call(taken, aten.gather.default, neighbours(taken, skew.rows, shift), -1, column)
        if result is None:
            result = found
        else:
            compared = (aten.ge.Scalar, shape[-1]) if shift > 0 else (aten.lt.Scalar, 0)
            is_there = insert_call(taken, compared[0], places, compared[1])
            result = insert_call(taken, aten.where.self, is_there, found, result)
    return result


def column_count(skew: Skew, taken: fx.Node, first: Any) -> Any:
    """Return how many columns are taken, as an argument that does not read it from them; None where none is known."""
    whole = plus(taken, size_of(taken, skew.rows, -1), skew.step)
    stops = [whole] if taken is skew.end else [whole, Call.of(taken)["end"]]
    counts = [minus(taken, stop, first) for stop in stops if isinstance(stop, int | fx.Node)]
    size = value_of(taken).shape[-1]
    return next((count for count in counts if statically_known_true(number_of(count) == size)), None)


def places_in_rows(skew: Skew, before: fx.Node, distances: list[Any], num_columns: Any) -> fx.Node:
    """Return for each element how far it is from the start of its row `[rows, columns]`, counted on over the ends."""
    row, tensor = coordinate(before, skew.rows, -2, [-1, 1]), value_of(before)
    with tensor.fake_mode:
        column = insert_call(before, aten.arange.default, num_columns, device=tensor.device)
    places = insert_call(before, aten.add.Tensor if skew.step > 0 else aten.sub.Tensor, column, row)
    for number in distances:
        places = places if number == 0 else insert_call(before, aten.add.Tensor, places, number)
    return places


def distance(skew: Skew, before: fx.Node, term: Term) -> Any:
    """Return a term as an argument that reads no size of what is replaced; None where that is not known."""
    rows, width = (size_of(before, skew.rows, dim) for dim in (-2, -1))
    sizes = [1, rows, width, plus(before, width, skew.step)]
    found = next((size for size in sizes if statically_known_true(number_of(size) == term.width)), None)
    return None if found is None else product(before, product(before, term.count, found), term.sign)


def neighbours(before: fx.Node, rows: fx.Node, shift: int) -> fx.Node:
    """Return for each row the next one, the one before it, or itself; zeros where there is none."""
    if not shift:
        return rows
    kept = insert_call(before, aten.slice.Tensor, rows, -2, *((1,) if shift > 0 else (0, -1)))
    return insert_call(before, aten.constant_pad_nd.default, kept, [0, 0, *((0, 1) if shift > 0 else (1, 0))])


def product(before: fx.Node, a: Any, b: Any) -> Any:
    """Return the product of two numbers of the graph."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return insert_call(before, operator.mul, a, b)
    return a * b


def minus(before: fx.Node, a: Any, b: Any) -> Any:
    """Return the difference of two numbers of the graph."""
    if b == 0:
        return a
    return insert_call(before, operator.sub, a, b) if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a - b


def plus(before: fx.Node, a: Any, b: Any) -> Any:
    """Return the sum of two numbers of the graph."""
    return insert_call(before, operator.add, a, b) if isinstance(a, fx.Node) else a + b
