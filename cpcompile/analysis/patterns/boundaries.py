"""Boundaries: ids and positions of the tokens of packed documents, computed once, on the device, from what tells them apart."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.errors import InputError
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import value_of
from cpcompile.options.documents import Source

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Boundaries:
    """Nodes of `[B, S]`.

    Attributes:
        ids: the document of each token: equal in a document, greater in a later one of the row.
        is_first, is_last: where documents begin and end. A row that is cut off ends none, unless its last token says so.
        positions: the place of each token in its document.
    """

    ids: fx.Node
    is_first: fx.Node
    is_last: fx.Node
    positions: fx.Node

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """All of them."""
        return self.ids, self.is_first, self.is_last, self.positions


def emit_boundaries(before: fx.Node, source: Source, tokens: fx.Node, told: fx.Node) -> Boundaries:
    """Insert the nodes that find the documents of `tokens` `[B, S, ...]`, of which `told` tells them apart.

    Raises:
        InputError: what tells them apart does not have a number for each token.
    """
    batch, length = (size_of(before, tokens, dim) for dim in (0, 1))
    with value_of(tokens).fake_mode:
        places = insert_call(before, aten.arange.default, length, device=value_of(tokens).device)
    if source.kind == "cu_seqlens":
        starts = changes(before, sequences(before, source, told, places, batch, length))
    else:
        starts = told_by_tokens(before, source, tokens, told)
    is_first = insert_call(before, aten.constant_pad_nd.default, starts, [1, 0], True)
    is_last = insert_call(before, aten.constant_pad_nd.default, starts, [0, 1], False)
    if source.kind == "eos":
        is_last = ends(before, source, told)
    ids = insert_call(
        before, aten.cumsum.default, insert_call(before, aten.to.dtype, is_first, torch.int32), 1, dtype=torch.int32
    )
    first = insert_call(before, aten.where.ScalarOther, is_first, places, 0)
    start = insert_call(before, operator.getitem, insert_call(before, aten.cummax.default, first, 1), 0)
    return Boundaries(ids, is_first, is_last, insert_call(before, aten.sub.Tensor, places, start))


def told_by_tokens(before: fx.Node, source: Source, tokens: fx.Node, told: fx.Node) -> fx.Node:
    """Return, bool `[B, S - 1]`, which tokens but the first begin a document, by a number for each token."""
    shape, wanted = value_of(told).shape, value_of(tokens).shape[:2]
    if len(shape) != 2 or str(shape[1]) != str(wanted[1]) or shape[0] not in (1, wanted[0]):
        raise InputError(
            f"documents={source.kind!r} reads a number for each token, {list(wanted)}, but {told.name} has shape {list(shape)}."
        )
    if source.kind != "eos":
        told = checked(before, told, source.kind, source.name, size_of(before, told, 1))
    told = insert_call(before, aten.expand.default, told, [size_of(before, tokens, dim) for dim in (0, 1)])
    if source.kind == "eos":
        return insert_call(before, aten.slice.Tensor, ends(before, source, told), 1, 0, -1)
    if source.kind == "ids":
        return changes(before, told)
    steps = insert_call(
        before, aten.sub.Tensor, *(insert_call(before, aten.slice.Tensor, told, 1, *cut) for cut in AFTER_BEFORE)
    )
    return insert_call(before, aten.ne.Scalar, steps, 1)


AFTER_BEFORE = ((1, None), (0, -1))


def changes(before: fx.Node, ids: fx.Node) -> fx.Node:
    """Return, bool `[B, S - 1]`, where an id is not that of the token before."""
    return insert_call(
        before, aten.ne.Tensor, *(insert_call(before, aten.slice.Tensor, ids, 1, *cut) for cut in AFTER_BEFORE)
    )


def ends(before: fx.Node, source: Source, tokens: fx.Node) -> fx.Node:
    """Return which tokens end a document, bool `[B, S]`."""
    first, *others = [insert_call(before, aten.eq.Scalar, tokens, token) for token in source.tokens]
    for other in others:
        first = insert_call(before, aten.logical_or.default, first, other)
    return first


def sequences(
    before: fx.Node, source: Source, cu_seqlens: fx.Node, places: fx.Node, batch: fx.Node | int, length: fx.Node | int
) -> fx.Node:
    """Return the sequence of each token, `[B, S]`: rows follow each other, as if they were one."""
    if value_of(cu_seqlens).dim() != 1 or value_of(cu_seqlens).dtype.is_floating_point:
        shape = list(value_of(cu_seqlens).shape)
        raise InputError(
            f"documents='cu_seqlens' reads cumulative lengths [N + 1], but {cu_seqlens.name} has the shape {shape}."
        )
    is_number = isinstance(batch, int) and isinstance(length, int)
    num_tokens = batch * length if is_number else insert_call(before, operator.mul, batch, length)  # type: ignore[operator]
    cu_seqlens = checked(before, cu_seqlens, source.kind, source.name, num_tokens)
    with value_of(places).fake_mode:
        rows = insert_call(before, aten.arange.default, batch, device=value_of(places).device)
    offsets = insert_call(before, aten.unsqueeze.default, insert_call(before, aten.mul.Tensor, rows, length), 1)
    flat = insert_call(
        before, aten.to.dtype, insert_call(before, aten.add.Tensor, offsets, places), value_of(cu_seqlens).dtype
    )
    return insert_call(before, aten.searchsorted.Tensor, cu_seqlens, flat, right=True)


def checked(before: fx.Node, told: fx.Node, kind: str, name: str, num_tokens: fx.Node | int) -> fx.Node:
    """Return what tells documents apart, checked when the program runs."""
    return insert_call(before, torch.ops.cpcompile.checked_packing.default, told, kind, name, num_tokens)


def size_of(before: fx.Node, node: fx.Node, dim: int) -> fx.Node | int:
    """Return a size as an argument."""
    size = value_of(node).shape[dim]
    return size if isinstance(size, int) else insert_call(before, aten.sym_size.int, node, dim)
