"""The rules of operators that join, pad, subtract or sum along one dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpcompile.analysis.masks.expression import ONE, ZERO, Affine, Expression, coordinate, is_natural
from cpcompile.analysis.masks.operands import INDEX_DTYPES, convert, exact, number_of, result_of
from cpcompile.analysis.masks.read import Reader, Unreadable, reads, size_of
from cpcompile.analysis.masks.simplify import as_value, both, choose, compare, map_leaves, substitute
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

# They join along this dim, vectors along their only one: `vstack` gives those another.
STACKS = {aten.hstack.default: 1, aten.vstack.default: 0}


@reads(aten.cat.default, aten.hstack.default, aten.vstack.default)
def cat(reader: Reader, call: Call) -> Expression:
    result, tensors = result_of(call), call["tensors"]
    if any(value_of(t).dim() != result.dim() for t in tensors):
        raise Unreadable
    dim = STACKS.get(call.target, call.arguments.get("dim")) if result.dim() > 1 else 0
    assert dim is not None
    dim %= result.dim()
    return joined([(reader.operand(t), value_of(t).shape[dim]) for t in tensors], dim, result.dtype)


def joined(pieces: Sequence[tuple[Expression, Any]], dim: int, dtype: torch.dtype) -> Expression:
    """Return pieces with their sizes, one after the other along `dim`."""
    (first, size), *rest = pieces
    first = convert(first, dtype)
    if not rest:
        return first
    beyond = coordinate(dim) - size_of(size)
    others = substitute(joined(rest, dim, dtype), {dim: beyond})
    return choose(compare("le", beyond + ONE), first, others)


@reads(aten.pad.default, aten.constant_pad_nd.default)
def pad(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    value = reader.operand(call["self"])
    fill = convert(reader.operand(call["value"] or 0), result.dtype)
    if "mode" in call and call["mode"] != "constant":
        raise Unreadable
    for i in range(0, len(call["pad"]), 2):
        dim = result.dim() - 1 - i // 2
        before, after = (number_of(reader, amount) for amount in call["pad"][i : i + 2])
        if not (is_natural(before) and is_natural(after)):
            raise Unreadable
        inner = coordinate(dim) - before
        beyond = inner + ONE - size_of(call.shape("self")[dim])
        inside = both(*(compare("le", part) for part, amount in ((-inner, before), (beyond, after)) if amount != ZERO))
        value = choose(inside, substitute(value, {dim: inner}), fill)
    return value


@reads(aten.diff.default)
def diff(reader: Reader, call: Call) -> Expression:
    result = result_of(call)
    dim = call.dim("dim", "self")
    if call["n"] != 1 or result.dtype not in INDEX_DTYPES:
        raise Unreadable
    tensors = [t for t in (call["prepend"], call["self"], call["append"]) if t is not None]
    pieces = [(reader.operand(t), value_of(t).shape[dim]) for t in tensors]
    whole = joined(pieces, dim, result.dtype)
    later = substitute(whole, {dim: coordinate(dim) + ONE})
    return map_leaves(lambda a, b: exact(a) - exact(b), as_value(later), as_value(whole))


@reads(aten.cumsum.default)
def cumsum(reader: Reader, call: Call) -> Expression:
    """The running sum of a constant; any other is loaded."""
    value = as_value(reader.operand(call["self"]))
    if not isinstance(value, Affine) or value.terms or result_of(call).dtype not in INDEX_DTYPES:
        raise Unreadable
    return (coordinate(call.dim("dim", "self")) + ONE) * value.constant
