"""Operators that put values into a copy of a tensor: what writes through views and indices become."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile.ir.operator_call import Call, expression
from cpcompile.rules.dims import closed, own
from cpcompile.rules.pointwise import aligned
from cpcompile.rules.registry import REASONS, Indices, Names, rule

aten = torch.ops.aten


@rule(aten.slice_scatter.default)
def slice_scatter(call: Call) -> Indices:
    """[a b], [a b'] -> [a b], closed along b"""
    names = closed(own(call), call.dim("dim", "self"))
    return Indices({"self": names, "src": names}, (names,))


@rule(aten.select_scatter.default)
def select_scatter(call: Call) -> Indices:
    """[a b], [a] -> [a b], closed along b"""
    names, dim = own(call), call.dim("dim", "self")
    return Indices({"self": closed(names, dim), "src": (*names[:dim], *names[dim + 1 :])}, (closed(names, dim),))


@rule(aten.diagonal_scatter.default)
def diagonal_scatter(call: Call) -> Indices:
    """[a b c], [a d] -> [a b c], closed along b and c"""
    dims = call.dim("dim1", "self"), call.dim("dim2", "self")
    names = closed(closed(own(call), dims[0]), dims[1])
    others = tuple(name for dim, name in enumerate(names) if dim not in dims)
    return Indices({"self": names, "src": (*others, None)}, (names,))


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default, aten.scatter_reduce.two)
def scatter(call: Call) -> Indices:
    """[a b], [a c], [a c] -> [a b], closed along b and where the index is smaller, because it writes the front only"""
    names = closed(own(call), call.dim("dim", "self"))
    operands = [name for name, _ in call.operands()]
    for dim, sizes in enumerate(zip(*(map(expression, call.shape(name)) for name in operands), strict=False)):
        if len(set(sizes)) > 1:
            names = closed(names, dim)
    return Indices(dict.fromkeys(operands, names), (names,))


@rule(aten.index_add.default, aten.index_copy.default, aten.index_reduce.default)
def index_add(call: Call) -> Indices:
    """[a b], [i], [a i] -> [a b], closed along b"""
    names = closed(own(call), call.dim("dim", "self"))
    return Indices({"self": names, "index": (None,) * len(call.shape("index")), "source": names}, (names,))


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(call: Call) -> Indices:
    """[a b], [i] -> [a b], closed along b"""
    names = closed(own(call), call.dim("dim", "self"))
    operands: dict[str, Names] = {"self": names, "index": (None,) * len(call.shape("index"))}
    return Indices(operands | ({"value": ()} if "value" in dict(call.operands()) else {}), (names,))


@rule(aten.index_put.default)
def index_put(call: Call) -> Indices:
    """[v ... d], [i], [i ... d] -> [v ... d], closed along the dims that are indexed, but not along those of a mask"""
    given = [(dim, f"indices.{dim}") for dim, node in enumerate(call["indices"]) if node is not None]
    names = own(call)
    if any(call.tensor(name).dtype in (torch.bool, torch.uint8) for _, name in given):
        return put_by_mask(call, given, names)
    dims = [dim for dim, _ in given]
    kept = tuple(None if dim in dims else name for dim, name in enumerate(names))
    operands: dict[str, Names] = {name: (None,) * len(call.shape(name)) for _, name in given}
    rank = max(len(names) for names in operands.values())
    first = dims[0] if dims == list(range(dims[0], dims[0] + len(dims))) else 0
    others = [dim for dim in range(len(names)) if dim not in dims]
    places = [*others[:first], *[None] * rank, *others[first:]]
    values = call.shape("values")
    shown: Names = tuple(
        None if dim is None or expression(size) != expression(call.shape("self")[dim]) else names[dim]
        for size, dim in zip(values, places[len(places) - len(values) :], strict=True)
    )
    return Indices({"self": kept, "values": shown, **operands}, (kept,))


def put_by_mask(call: Call, given: list[tuple[int, str]], names: Names) -> Indices:
    """Return the names for a mask over some of the dims: pointwise if what it puts is the same at each of them."""
    (first, mask), *others = given
    rank, shape = len(call.shape(mask)), call.shape("self")
    values = call.shape("values")
    rest: tuple[Any, ...] = shape[first + rank :]
    if others or len(values) > len(rest) or call.tensor(mask).dtype != torch.bool:
        return Indices({name: (None,) * len(call.shape(name)) for name, _ in call.operands()}, ((None,) * len(names),))
    shift = len(shape) - len(rest)
    shown = tuple(name and f"d{int(name[1:]) + shift}" for name in aligned(values, rest))
    return Indices({"self": names, mask: names[first : first + rank], "values": shown}, (names,))


def why_inputs_stay_whole(call: Call) -> str:
    """Return why no rank can copy its tokens to an input."""
    return "an input or a buffer is written, which every rank holds whole, and the value holds each rank's own tokens"


REASONS[aten.copy_.default] = why_inputs_stay_whole
