"""Attention written out: `dropout(softmax(cap(q @ k^T * scale) + masks)) @ v`."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.attention import Attention, can_drop, is_batched
from cpcompile.analysis.patterns.masking import can_mask, is_filled, written_mask
from cpcompile.analysis.patterns.nodes import converted, is_conversion, second, source
from cpcompile.analysis.patterns.scores import PRODUCTS, read_scores
from cpcompile.analysis.patterns.sinks import drops_column, of_heads, read_sinks
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}

# A chain that crosses one of these is not computed under one mode: its gradient or its dtypes would change.
_MODE_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast"}


def read_written_out(node: fx.Node, reader: Reader, exact_dropout: bool) -> Attention | None:
    """Read `dropout(softmax(cap(q @ k^T * scale) + masks)) @ v`, from its softmax."""
    if node.target not in _SOFTMAX or Call.of(node)["dim"] not in (-1, value_of(node).dim() - 1):
        return None
    with_sinks = read_sinks(source(node))
    scores = read_scores(source(node) if with_sinks is None else with_sinks.scores, reader)
    weighing = read_weighing(node, has_sinks=with_sinks is not None)
    if scores is None or weighing is None or switches_mode(scores.product, weighing[-1]):
        return None
    end = weighing[-1]
    dtype = value_of(end).dtype
    keys = second(scores.product)
    written = [source(scores.product), source(keys) if is_transposition(keys) else keys, second(end)]
    q_shape, k_shape, v_shape = (value_of(x).shape for x in (written[0], keys, written[2]))
    keeps_dtype = value_of(scores.product).dtype == dtype or all(is_of(x, dtype) for x in written)
    dropout = dropout_of(weighing)
    if (
        dropout is None
        or not can_drop(q_shape[-2], k_shape[-1], dropout, exact_dropout)
        or not keeps_dtype
        or not is_batched(q_shape, [*k_shape[:-2], k_shape[-1], k_shape[-2]], v_shape)
        or not can_mask(scores.masks, reader)
    ):
        return None
    q, k, v = (of_dtype(end, x, dtype) for x in written)
    k = k if is_transposition(keys) else insert_call(end, aten.transpose.int, k, -2, -1)
    return Attention(
        nodes=(*scores.nodes, *(() if with_sinks is None else with_sinks.nodes), *weighing),
        q=q,
        k=k,
        v=v,
        mask=written_mask(end, scores),
        scale=scores.scale,
        softcap=scores.softcap,
        dropout=dropout,
        sinks=None if with_sinks is None else of_heads(end, with_sinks.column, q_shape[1]),
        is_filled=is_filled(scores.masks),
    )


def read_weighing(softmax: fx.Node, has_sinks: bool) -> tuple[fx.Node, ...] | None:
    """Read on from a softmax to the product with the values, the last node, as long as nothing else uses the weights.

    With sinks, their column is dropped first.
    """
    nodes = [softmax]
    if has_sinks:
        (node,) = softmax.users if len(softmax.users) == 1 else (softmax,)
        if not drops_column(node, softmax):
            return None
        nodes.append(node)
    while len(nodes[-1].users) == 1:
        (node,) = nodes[-1].users
        nodes.append(node)
        if node.target in PRODUCTS:
            return tuple(nodes) if node.args[0] is nodes[-2] is not node.args[1] else None
        if not is_conversion(node) and node.target is not aten.dropout.default:
            return None
    return None


def dropout_of(weighing: tuple[fx.Node, ...]) -> float | None:
    """Return the probability of a weight being dropped, or None where two dropouts do it."""
    calls = [Call.of(node) for node in weighing if node.target is aten.dropout.default]
    rates = [float(call["p"]) for call in calls if call["train"] and call["p"]]
    return sum(rates) if len(rates) < 2 else None


def switches_mode(first: fx.Node, last: fx.Node) -> bool:
    """Tell whether autocast or gradients are switched between two nodes."""
    node = first
    while node is not last:
        if getattr(node.target, "__name__", "") in _MODE_SWITCHES:
            return True
        node = node.next
    return False


def is_of(node: fx.Node, dtype: torch.dtype) -> bool:
    """Tell whether an operand is in `dtype`, or was converted from it just before."""
    return value_of(node).dtype == dtype or (is_conversion(node) and value_of(source(node)).dtype == dtype)


def of_dtype(before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return an operand in the dtype of the result, from before its conversion if it was converted."""
    is_original = value_of(node).dtype != dtype and is_of(node, dtype)
    return source(node) if is_original else converted(before, node, dtype)


def is_transposition(node: fx.Node) -> bool:
    """Tell whether a node exchanges the last two dims of another."""
    rank = value_of(node).dim()
    if node.target is not aten.transpose.int:
        return False
    call = Call.of(node)
    return {call.dim("dim0", "self"), call.dim("dim1", "self")} == {rank - 2, rank - 1}
