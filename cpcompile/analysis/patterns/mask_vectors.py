"""What masks say of each token or each sequence, as nodes for the arguments of the attention operator."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence

import torch
from torch import fx

from cpcompile.analysis.masks.expression import Affine, Compare, Coordinate, Load, Quotient, Truth
from cpcompile.analysis.masks.recognise import is_load_per_batch, key_load
from cpcompile.analysis.patterns.formula import coordinate, size_of
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


def real_keys(call: Call, predicates: Collection[Compare | Truth]) -> fx.Node:
    """Return which keys are real, bool `[B|1, S]`: all predicates, and what the attention was given before."""
    parts: list[fx.Node] = [] if call["key_padding"] is None else [call["key_padding"]]
    parts += [rows_of(call.node, key_predicate(call, part)) for part in sorted(predicates, key=str)]
    result = parts[0]
    for part in parts[1:]:
        result = insert_call(call.node, aten.logical_and.default, result, part)
    return result


def key_predicate(call: Call, part: Compare | Truth) -> fx.Node:
    """Return the node that computes a predicate of one per-token value, or of a sum of integers."""
    load, before = key_load(part), call.node
    names: dict[str, torch._ops.OpOverload] = {"eq": aten.eq.Scalar, "ne": aten.ne.Scalar}
    if load is None:
        assert isinstance(part, Compare)
        return insert_call(before, names.get(part.kind, aten.le.Scalar), integers(call, part.value), 0)
    node: fx.Node = load.node
    if isinstance(part, Truth):
        return insert_call(before, aten.logical_not.default, node) if part.is_negated else node
    sign = dict(part.value.terms)[load]
    target = names.get(part.kind, aten.le.Scalar if sign > 0 else aten.ge.Scalar)
    return insert_call(before, target, node, -sign * part.value.constant)


def document_ids(call: Call, documents: Collection[Affine]) -> fx.Node:
    """Return one id of each token, `[B|1, S]`, equal where all ids are, and that which the attention was given before."""
    ids: list[fx.Node] = [] if call["documents"] is None else [call["documents"]]
    return joined_ids(call, ids + [integers(call, number) for number in sorted(documents, key=str)])


def joined_ids(call: Call, ids: Sequence[fx.Node]) -> fx.Node:
    """Return one id of each token, `[B|1, S]`, equal where all of `ids` are."""
    result, size = ids[0], size_of(call.node, call["k"], 2)
    for other in ids[1:]:
        # Ranks among the ids of a sequence are below its length, so that no two pairs of them meet.
        first, second = (ranks(call.node, x) for x in (result, other))
        result = insert_call(call.node, aten.add.Tensor, insert_call(call.node, aten.mul.Tensor, first, size), second)
    return result


def integers(call: Call, value: Affine) -> fx.Node:
    """Return an integer of each token, `[B|1, S]`."""
    before, result = call.node, None
    for atom, factor in sorted(value.terms, key=str):
        if isinstance(atom, Coordinate):
            term = coordinate(before, call["k"], 2, [1, -1])
        elif isinstance(atom, Quotient):
            term = insert_call(
                before, aten.div.Tensor_mode, integers(call, atom.value), atom.divisor, rounding_mode="floor"
            )
        else:
            assert isinstance(atom, Load)
            is_per_batch = is_load_per_batch(atom)
            term = (
                insert_call(before, aten.view.default, atom.node, [-1, 1])
                if is_per_batch
                else rows_of(before, atom.node)
            )
            term = (
                term if value_of(term).dtype == torch.int64 else insert_call(before, aten.to.dtype, term, torch.int64)
            )
        term = term if factor == 1 else insert_call(before, aten.mul.Tensor, term, factor)
        result = term if result is None else insert_call(before, aten.add.Tensor, result, term)
    assert result is not None
    return insert_call(before, aten.add.Tensor, result, value.constant) if value.constant else result


def ranks(before: fx.Node, ids: fx.Node) -> fx.Node:
    """Return, for each id of `[B|1, S]`, how many in its row are less: equal for equal ids, and below S."""
    ordered = insert_call(before, aten.sort.default, ids, 1)
    values = insert_call(before, operator.getitem, ordered, 0)
    return insert_call(before, aten.searchsorted.Tensor, values, insert_call(before, aten.contiguous.default, ids))


def prefix_lengths(before: fx.Node, prefix: Affine) -> fx.Node:
    """Return the length of each prefix, int64 `[B|1]`."""
    result = None
    for atom, factor in sorted(prefix.terms, key=str):
        assert isinstance(atom, Load)
        term = insert_call(before, aten.to.dtype, insert_call(before, aten.view.default, atom.node, [-1]), torch.int64)
        term = term if factor == 1 else insert_call(before, aten.mul.Tensor, term, factor)
        result = term if result is None else insert_call(before, aten.add.Tensor, result, term)
    if result is None:
        with value_of(before).fake_mode:
            device = value_of(before).device
            return insert_call(before, aten.full.default, [1], prefix.constant, dtype=torch.int64, device=device)
    return insert_call(before, aten.add.Tensor, result, prefix.constant) if prefix.constant else result


def rows_of(before: fx.Node, vector: fx.Node) -> fx.Node:
    """Return a per-token value with a batch dim."""
    return insert_call(before, aten.unsqueeze.default, vector, 0) if value_of(vector).dim() == 1 else vector
