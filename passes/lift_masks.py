"""Lift masks: a dense mask that is recognised becomes arguments of its attention.

before  mask = aten.expand((kv <= q) & (id[b, q] == id[b, kv]) & padding[b, kv])
        out = cpcompile.attention(q, k, v, mask, None, None, 0.25, False, 0, 0.0)
after   out = cpcompile.attention(q, k, v, None, id, padding, 0.25, True, 0, 0.0)    # no S x S tensor is left

A mask that is not recognised whole stays as it is. One that adds a finite number is lifted only where every
row provably keeps a
key: a row without one attends to all keys evenly, which no predicate says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.call import Call, value_of
from cpcompile.emit import emit
from cpcompile.masks.expression import Compare, Load, Truth, shifted
from cpcompile.masks.read import Reader
from cpcompile.masks.recognise import Mask, key_load, predicate, recognise

aten = torch.ops.aten


def lift_masks(gm: fx.GraphModule) -> int:
    """Return how many attentions lost their dense mask. Runs after `find_attention`, before anything is sharded."""
    reader = Reader(gm)
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default):
        call = Call.of(node)
        mask = None if call["mask"] is None else meaning(call, reader)
        if mask is not None:
            put(call, mask)
            count += 1
    return count


def meaning(call: Call, reader: Reader) -> Mask | None:
    """Return what the dense mask of an attention means in the terms of the operator, or None."""
    value = reader.read(call["mask"])
    dense = call.tensor("mask")
    found = None if value is None else predicate(shifted(value, 4 - dense.dim()), dense.dtype)
    mask = None if found is None else recognise(found[0], reader)
    if mask is None or found is None or not fits(call, mask):
        return None
    return mask if found[1] or mask.shows_own_token else None


def fits(call: Call, mask: Mask) -> bool:
    """Tell whether the operator can say the mask at the sizes of the attention, beside what it says already."""
    batch, _, num_queries, _ = call.shape("q")
    num_keys = call.shape("k")[2]
    is_self = statically_known_true(num_queries == num_keys)
    vectors = [(mask.documents, num_queries), *((key_load(part), num_keys) for part in mask.key_padding)]
    fit = all(is_vector(load, batch, tokens) for load, tokens in vectors if load is not None)
    needs_self = mask.is_causal or mask.documents is not None
    taken = call["documents"] if mask.documents is not None else None
    return fit and taken is None and (is_self or not needs_self)


def is_vector(load: Load, batch: Any, tokens: Any) -> bool:
    """Tell whether a per-token value has a row for all or for each sequence, as long as the sequence."""
    *rows, length = value_of(load.node).shape
    return statically_known_true(length == tokens) and (
        not rows or statically_known_true(rows[0] == batch) or rows == [1]
    )


def put(call: Call, mask: Mask) -> None:
    """Give the attention the arguments that mean the mask, beside those that it has."""
    window = min(size for size in (call["window"], mask.window) if size) if call["window"] and mask.window else 0
    changes = {
        "mask": None,
        "is_causal": call["is_causal"] or mask.is_causal,
        "window": window or call["window"] or mask.window,
    }
    if mask.documents is not None:
        changes["documents"] = rows_of(call.node, mask.documents.node)
    if mask.key_padding:
        changes["key_padding"] = real_keys(call, mask)
    call.node.args, call.node.kwargs = call.rebound(changes)


def real_keys(call: Call, mask: Mask) -> fx.Node:
    """Return which keys are real: all predicates, and what the attention was given before."""
    parts: list[fx.Node] = [] if call["key_padding"] is None else [call["key_padding"]]
    parts += [rows_of(call.node, key_predicate(call.node, part)) for part in sorted(mask.key_padding, key=str)]
    result = parts[0]
    for part in parts[1:]:
        result = emit(call.node, aten.logical_and.default, result, part)
    return result


def key_predicate(before: fx.Node, part: Compare | Truth) -> fx.Node:
    """Return the node that computes a predicate of one per-token value."""
    load = key_load(part)
    assert load is not None
    node: fx.Node = load.node
    if isinstance(part, Truth):
        return emit(before, aten.logical_not.default, node) if part.is_negated else node
    sign = dict(part.value.terms)[load]
    names: dict[str, torch._ops.OpOverload] = {"eq": aten.eq.Scalar, "ne": aten.ne.Scalar}
    target = names.get(part.kind, aten.le.Scalar if sign > 0 else aten.ge.Scalar)
    return emit(before, target, node, -sign * part.value.constant)


def rows_of(before: fx.Node, vector: fx.Node) -> fx.Node:
    """Return a per-token value with a batch dim."""
    return emit(before, aten.unsqueeze.default, vector, 0) if value_of(vector).dim() == 1 else vector


def describe(node: fx.Node | Call) -> str:
    """Return the mask of an attention in words: `causal, window 4096, key padding`, or `dense [1, 1, S, S]`."""
    call = node if isinstance(node, Call) else Call.of(node)
    words = {
        "causal": call["is_causal"],
        f"window {call['window']}": call["window"],
        "documents": call["documents"] is not None,
        "key padding": call["key_padding"] is not None,
        "dense": call["mask"] is not None,
    }
    if call["mask"] is not None:
        shape = ", ".join(str(size) for size in call.shape("mask"))
        words[f"dense [{shape}]"] = words.pop("dense")
    return ", ".join(word for word, holds in words.items() if holds) or "all"
