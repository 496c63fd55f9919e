"""Views: computed anew on another tensor, and undone, so that a value written through a view reaches what it is a view of."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.capture.writes.aliases import same_layout
from cpcompile.errors import NoRule, where
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

# They move dims and nothing else.
PERMUTATIONS = {
    aten.adjoint.default,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
    aten.numpy_T.default,
    aten.permute.default,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.transpose.int,
}
# They keep the order of the elements; `expand` does where it adds dims of size 1 only.
RESHAPES = {
    aten._unsafe_view.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.ravel.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view_as.default,
}
# They cut a tensor into pieces along a dim, and whether the pieces keep that dim.
CUTS = {
    aten.chunk.default: True,
    aten.split.Tensor: True,
    aten.split.sizes: True,
    aten.split_with_sizes.default: True,
    aten.tensor_split.indices: True,
    aten.tensor_split.sections: True,
    aten.unbind.int: False,
}
# A view asks for strides that a value made anew may not have.
COPYING: dict[Any, torch._ops.OpOverload] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
}


def sizes(before: fx.Node, node: fx.Node) -> list[fx.Node | int]:
    """Return the sizes of `node` as graph arguments."""
    shape = value_of(node).shape
    return [
        size if isinstance(size, int) else insert_call(before, aten.sym_size.int, node, i)
        for i, size in enumerate(shape)
    ]


def replay(before: fx.Node, view: fx.Node, args: Any, kwargs: Any) -> fx.Node:
    """Return the view `view` of other operands."""
    if view.target in (aten.as_strided.default, aten._reshape_alias.default):
        raise NoRule(refusal(view, "its elements are chosen by strides, which a value made anew may not have"))
    assert callable(view.target)
    return insert_call(before, COPYING.get(view.target, view.target), *args, **kwargs)


def write_back(before: fx.Node, view: fx.Node, source: fx.Node, old: fx.Node, new: fx.Node) -> fx.Node:
    """Return what `source`, of value `old`, holds after its view `view` became `new`."""
    whole, part = value_of(source), value_of(view)
    if same_layout(whole, part) and whole.dtype == part.dtype:
        return new
    if view.target in WRITE_BACKS:
        return WRITE_BACKS[view.target](before, Call.of(view), old, new)
    if view.target in PERMUTATIONS:
        return insert_call(before, aten.permute.default, new, inverse_permutation(view, whole.dim()))
    if view.target in RESHAPES and statically_known_true(whole.numel() == part.numel()):
        return insert_call(before, aten.reshape.default, new, sizes(before, old))
    raise NoRule(refusal(view, "a write through this view cannot be written without operators in place"))


def join_pieces(before: fx.Node, view: fx.Node, pieces: fx.Node, new: fx.Node) -> fx.Node:
    """Return what a tensor that was cut into `pieces` holds after the piece `view` became `new`."""
    cut = view.args[0]
    assert isinstance(cut, fx.Node)
    if cut.target not in CUTS:
        raise NoRule(refusal(cut, "a write through this view cannot be written without operators in place"))
    index, dim = view.args[1], Call.of(cut)["dim"]
    parts = [new if i == index else insert_call(before, operator.getitem, pieces, i) for i in range(len(value_of(cut)))]
    return insert_call(before, aten.cat.default if CUTS[cut.target] else aten.stack.default, parts, dim)


def inverse_permutation(view: fx.Node, rank: int) -> list[int]:
    """Return the permutation of dims that undoes `view`, found by what it does to a tensor whose sizes all differ."""
    distinct = torch.empty([i + 2 for i in range(rank)], device="meta")
    assert callable(view.target)
    moved = view.target(distinct, *view.args[1:], **view.kwargs)
    places = [size - 2 for size in moved.shape]
    return [places.index(i) for i in range(rank)]


def refusal(node: fx.Node, reason: str) -> str:
    """Return the text of a refusal at `node`."""
    remedy = "Write it without an operator in place: x = x + y for x += y, torch.cat or torch.where for x[...] = y."
    return f"{node.target}: {reason}.\n\n{where(node)}\n\n{remedy}"


def _slice(before: fx.Node, call: Call, old: fx.Node, new: fx.Node) -> fx.Node:
    return insert_call(
        before, aten.slice_scatter.default, old, new, *(call[n] for n in ("dim", "start", "end", "step"))
    )


def _narrow(before: fx.Node, call: Call, old: fx.Node, new: fx.Node) -> fx.Node:
    start, length = call["start"], call["length"]
    if not isinstance(start, int) or start < 0:
        raise NoRule(refusal(call.node, "a write through it where the start is no plain number is not supported"))
    end = start + length if isinstance(length, int) else insert_call(before, operator.add, start, length)
    return insert_call(before, aten.slice_scatter.default, old, new, call["dim"], start, end)


def _select(before: fx.Node, call: Call, old: fx.Node, new: fx.Node) -> fx.Node:
    return insert_call(before, aten.select_scatter.default, old, new, call["dim"], call["index"])


def _diagonal(before: fx.Node, call: Call, old: fx.Node, new: fx.Node) -> fx.Node:
    return insert_call(before, aten.diagonal_scatter.default, old, new, *(call[n] for n in ("offset", "dim1", "dim2")))


WRITE_BACKS: dict[Any, Callable[[fx.Node, Call, fx.Node, fx.Node], fx.Node]] = {
    aten.diagonal.default: _diagonal,
    aten.narrow.default: _narrow,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
}
