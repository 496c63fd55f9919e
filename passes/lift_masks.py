"""Lift masks: a dense mask that is recognised becomes arguments of its attention.

before  mask = aten.expand((kv <= q) & (id[b, q] == id[b, kv]) & padding[b, kv])
        out = cpcompile.attention(q, k, v, mask, None, None, 0.25, False, 0, 0.0)
after   out = cpcompile.attention(q, k, v, None, id, padding, 0.25, True, 0, 0.0)    # no S x S tensor is left

A mask that is not recognised whole stays as it is. One that adds a finite number is lifted only where every row
provably keeps a key: a row without one attends to all keys evenly, which no predicate says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.bias import Bias, BiasReader
from cpcompile.analysis.masks.expression import Load
from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.masks.recognise import Mask, all_loads, is_load_per_batch, recognise
from cpcompile.analysis.patterns.mask_summands import Summands, read_summands, slopes_of
from cpcompile.analysis.patterns.mask_vectors import document_ids, prefix_lengths, real_keys
from cpcompile.ir.operator_call import Call, value_of


def lift_masks(gm: fx.GraphModule) -> int:
    """Return how many attentions lost their dense mask.

    Needs: `cp.attention` nodes, whose masks are tensors (`find_attention`).
    Gives: masks and biases as arguments: `is_causal`, `window`, `documents`, `key_padding`, `slopes`, ...
    """
    reader, biases = Reader(gm), {dtype: BiasReader(gm, dtype) for dtype in (torch.float32, torch.float64)}
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default):
        call = Call.of(node)
        if call["mask"] is None:
            continue
        is_double = call.tensor("q").dtype == torch.float64
        found = read_summands(call["mask"], reader, biases[torch.float64 if is_double else torch.float32])
        mask = None if found is None else understood(call, found, reader)
        if mask is not None and found is not None:
            give_arguments(call, mask, found.bias)
            count += 1
    return count


def understood(call: Call, found: Summands, reader: Reader) -> Mask | None:
    """Return what the dense mask of an attention hides in the terms of the operator, beside those that it has, or None."""
    mask = recognise(found.visible, reader, mask_of(call))
    if mask is None or not can_say(call, mask) or not (found.bias is None or can_slope(call, mask, found.bias)):
        return None
    return mask if found.is_infinite or mask.shows_own_token else None


def can_slope(call: Call, mask: Mask, bias: Bias) -> bool:
    """Tell whether the operator can say a bias. A number for a whole row changes no weight, unless there are sinks."""
    is_one_sided = mask.ahead == 0 and mask.prefix is None
    means_distance = bias.is_distance or (is_one_sided and not (bias.has_rows and call["sinks"] is not None))
    num_heads = value_of(bias.slopes.node).numel()
    is_self = statically_known_true(call.shape("q")[2] == call.shape("k")[2])
    return means_distance and is_self and num_heads == call.shape("q")[1] and call["slopes"] is None


def mask_of(call: Call) -> Mask:
    """Return what an attention says already of the places that a query sees."""
    ahead = 0 if call["is_causal"] else call["lookahead"] if call["lookahead"] >= 0 else None
    return Mask(ahead=ahead, window=call["window"])


def can_say(call: Call, mask: Mask) -> bool:
    """Tell whether the operator can say the mask at the sizes of the attention."""
    batch, _, num_queries, _ = call.shape("q")
    num_keys = call.shape("k")[2]
    is_self = statically_known_true(num_queries == num_keys)
    fit = all(is_vector(load, batch, num_keys) for load in all_loads(mask))
    return fit and (is_self or not mask.is_of_places)


def is_vector(load: Load, batch: Any, tokens: Any) -> bool:
    """Tell whether a value for each token or each sequence has a row for all or for each, as long as the sequence."""
    sizes = list(value_of(load.node).shape)
    rows = sizes[:1] if is_load_per_batch(load) else sizes[:-1]
    is_long = is_load_per_batch(load) or statically_known_true(sizes[-1] == tokens)
    return is_long and (not rows or statically_known_true(rows[0] == batch) or statically_known_true(rows[0] == 1))


def give_arguments(call: Call, mask: Mask, bias: Bias | None) -> None:
    """Give the attention the arguments that mean the mask, beside those that it has."""
    changes: dict[str, Any] = {
        "mask": None,
        "is_causal": mask.ahead == 0,
        "lookahead": mask.ahead or -1,
        "window": mask.window,
    }
    if bias is not None:
        changes["slopes"] = slopes_of(call, bias)
    if mask.prefix is not None:
        changes["prefix"] = prefix_lengths(call.node, mask.prefix)
    if mask.documents:
        changes["documents"] = document_ids(call, mask.documents)
    if mask.key_padding:
        changes["key_padding"] = real_keys(call, mask.key_padding)
    call.node.args, call.node.kwargs = call.rebound(changes)


def describe(node: fx.Node | Call) -> str:
    """Return the mask of an attention in words: `causal, window 4096, key padding`, or `dense [1, 1, S, S]`."""
    call = node if isinstance(node, Call) else Call.of(node)
    words = {
        "causal": call["is_causal"],
        "prefix": call["prefix"] is not None,
        f"look-ahead {call['lookahead']}": call["lookahead"] >= 0,
        f"window {call['window']}": call["window"],
        "documents": call["documents"] is not None,
        "key padding": call["key_padding"] is not None,
        "dense": call["mask"] is not None,
        "ALiBi": call["slopes"] is not None,
        "sinks": call["sinks"] is not None,
    }
    if call["mask"] is not None:
        shape = ", ".join(str(size) for size in call.shape("mask"))
        words = {f"dense [{shape}]" if word == "dense" else word: holds for word, holds in words.items()}
    return ", ".join(word for word, holds in words.items() if holds) or "all"
