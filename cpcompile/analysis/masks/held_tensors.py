"""Held tensors: what a buffer of the model holds when it is compiled, as an expression where it is made of a few runs.

`register_buffer("mask", torch.ones(n, n).tril())` holds `Choice(d1 <= d0, 1, 0)` at (d0, d1). A mask, a window or a vector of
places is one of few values that follow each other along the difference of two coordinates, or along one; a table of biases is
slopes times places. Anything else is not read. What was found is noted on the placeholder, and the compiled program looks
whether it still is so when the buffer has been written since.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.analysis.masks.expression import FALSE, TRUE, Affine, Expression, Load, Number, coordinate, scaled
from cpcompile.analysis.masks.simplify import choice, choose, compare
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.insertion import insert_call

aten = torch.ops.aten

# A band has a run before it, one inside and one behind.
MOST_RUNS = 3
# A registered buffer, or a tensor that a module has as an attribute.
_OF_MODULE = re.compile(r"(\._buffers\['[^']+'\]|\._modules\['[^']+'\]\.\w+)$")


@dataclass(frozen=True, slots=True)
class SlopedTable:
    """A table `[..., H, rows | 1, columns]` of `slopes[h]` times places.

    These are `column - row` if it is `of_rows`, of which with `is_distance` minus the absolute value is taken, else
    `column - origin`.
    """

    of_rows: bool = False
    is_distance: bool = False
    origin: int = 0

    @property
    def unit(self) -> tuple[int, int, int]:
        """A row, a column, and the place 1 or -1 that is there."""
        if self.of_rows:
            return 1, 0, -1
        return (0, 1, 1) if self.origin == 0 else (0, self.origin - 1, -1)

    def places(self, shape: torch.Size, device: torch.device) -> torch.Tensor:
        """Return what the slopes are multiplied with."""
        rows, columns = shape[-2:]
        at = torch.arange(columns, device=device)
        if not self.of_rows:
            return at - self.origin
        apart = at - torch.arange(rows, device=device)[:, None]
        return -apart.abs() if self.is_distance else apart

    def is_in(self, table: torch.Tensor) -> bool:
        """Tell whether a table is this one of its own slopes, to the last bit."""
        row, column, sign = self.unit
        if table.shape[-2] <= row or table.shape[-1] <= column:
            return False
        slopes = table[..., row, column, None, None] * sign
        return torch.equal(table, (slopes * self.places(table.shape, table.device)).expand_as(table))


def held(node: fx.Node) -> Any:
    """Return what a placeholder is found to hold, an expression or a `SlopedTable`; None where it is not read.

    Read is a buffer, or another tensor of a module, that the graph does not write and that takes no gradient.
    """
    if node.op != "placeholder" or not _OF_MODULE.search(_torch.source_name(node)):
        return None
    if any(user.target is aten.copy_.default and user.args[0] is node for user in node.users):
        return None
    if not annotation(node).held:
        example = getattr(node.meta.get("grapharg"), "example", None)
        annotate(node, held=(found_in(example),))
    return annotation(node).held[0]


def found_in(tensor: object) -> Any:
    """Return what a tensor holds: an expression over its coordinates or a `SlopedTable`, or None."""
    if type(tensor) is not torch.Tensor or tensor.is_meta or tensor.requires_grad or tensor.is_complex():
        return None
    wide = [dim for dim, size in enumerate(tensor.shape) if size > 1]
    found = expression_of(tensor, wide) if len(wide) in (1, 2) else None
    return found if found is not None or not tensor.is_floating_point() or tensor.dim() < 3 else sloped(tensor)


def sloped(table: torch.Tensor) -> SlopedTable | None:
    """Return which table of slopes this is, or None."""
    kinds = (
        SlopedTable(of_rows=True),
        SlopedTable(of_rows=True, is_distance=True),
        SlopedTable(origin=table.shape[-1] - 1),
        SlopedTable(),
    )
    return next((kind for kind in kinds if kind.is_in(table)), None)


def expression_of(tensor: torch.Tensor, wide: list[int]) -> Expression | None:
    """Return a tensor that has one or two `wide` dims as an expression over its coordinates, or None."""
    flat = tensor.reshape([tensor.shape[dim] for dim in wide])
    if flat.dim() == 1:
        if flat.dtype is torch.bool:
            return of_runs(flat, coordinate(wide[0]))
        are_places = flat.dtype is torch.int64 and torch.equal(flat, torch.arange(len(flat), device=flat.device))
        return coordinate(wide[0]) if are_places else None
    row, column = (coordinate(dim) for dim in wide)
    if torch.equal(flat[1:, 1:], flat[:-1, :-1]):
        along = torch.cat([flat[:, 0].flip(0), flat[0, 1:]])
        return of_runs(along, column - row + Affine(flat.shape[0] - 1))
    if torch.equal(flat, flat[:1].expand_as(flat)):
        return of_runs(flat[0], column)
    return of_runs(flat[:, 0], row) if torch.equal(flat, flat[:, :1].expand_as(flat)) else None


def of_runs(vector: torch.Tensor, index: Affine) -> Expression | None:
    """Return the element of a vector at an index, if there are few runs of equal elements."""
    values, lengths = torch.unique_consecutive(vector, return_counts=True)
    # Numbers that are all alike may be a gate or a statistic that changes from step to step.
    if len(values) > MOST_RUNS or (len(values) == 1 and vector.dtype is not torch.bool):
        return None
    ends = lengths.cumsum(0).tolist()
    *before, result = (constant_of(value, vector.dtype) for value in values.tolist())
    for value, end in reversed(list(zip(before, ends, strict=False))):
        result = choose(compare("le", index - Affine(end - 1)), value, result)
    return result


def constant_of(value: float, dtype: torch.dtype) -> Expression:
    """Return an element as a constant."""
    if dtype is torch.bool:
        return TRUE if value else FALSE
    return Number(float(value)) if dtype.is_floating_point else Affine(int(value))


def bias_of(node: fx.Node, table: SlopedTable) -> Expression:
    """Return a table that a placeholder holds as its slopes, which become a node of the graph, times places."""
    row, column, sign = table.unit
    first = next(n for n in node.graph.nodes if n.op != "placeholder")
    slopes = insert_call(first, aten.select.int, insert_call(first, aten.select.int, node, -1, column), -1, row)
    slopes = slopes if sign > 0 else insert_call(first, aten.neg.default, slopes)
    rank = node.meta["val"].dim()
    load = Load(slopes, tuple(coordinate(dim) for dim in range(rank - 2)))
    key, query = coordinate(rank - 1), coordinate(rank - 2)
    if not table.of_rows:
        return scaled(load, key - Affine(table.origin))
    straight = scaled(load, key - query)
    return choice(compare("le", key - query), straight, -straight) if table.is_distance else straight
