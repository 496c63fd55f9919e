"""Attention written out: `dropout(softmax(cap(q @ k^T * scale) + masks)) @ v`."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.masks.read import Reader
from cpcompile.analysis.patterns.attention import Attention, can_drop, is_batched
from cpcompile.analysis.patterns.masking import read_masks, written_mask
from cpcompile.analysis.patterns.nodes import converted, is_conversion, records_gradients, second, source, switches_mode
from cpcompile.analysis.patterns.scores import ScoreReader, Temperature
from cpcompile.analysis.patterns.sinks import of_heads, read_sinks
from cpcompile.analysis.patterns.weights import dropout_of, read_weights
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten._safe_softmax.default, aten.special_softmax.default}


def read_written_out(node: fx.Node, reader: Reader, exact_dropout: bool) -> Attention | None:
    """Read `dropout(softmax(cap(q @ k^T * scale) + masks)) @ v`, from its softmax."""
    if node.target not in _SOFTMAX or Call.of(node)["dim"] not in (-1, value_of(node).dim() - 1):
        return None
    with_sinks = read_sinks(source(node), reader)
    scores = ScoreReader(reader).read(source(node) if with_sinks is None else with_sinks.scores)
    weights = read_weights(node, reader, with_sinks)
    if scores is None or weights is None or switches_mode(scores.product, weights.product):
        return None
    end = weights.product
    nodes = (*scores.nodes, *(() if with_sinks is None else with_sinks.nodes), *weights.nodes)
    dtype = value_of(end).dtype
    keys = second(scores.product)
    written = [source(scores.product), source(keys) if is_transposition(keys) else keys, second(end)]
    q_shape, k_shape, v_shape = (value_of(x).shape for x in (written[0], keys, written[2]))
    keeps_dtype = value_of(scores.product).dtype == dtype or all(is_of(x, dtype) for x in written)
    dropout = dropout_of(weights)
    if (
        dropout is None
        or (with_sinks is not None and scores.is_shifted)
        or not can_drop(q_shape[-2], k_shape[-1], dropout, exact_dropout)
        or not keeps_dtype
        or not is_batched(q_shape, [*k_shape[:-2], k_shape[-1], k_shape[-2]], v_shape)
        or are_needed(nodes, dropout > 0)
    ):
        return None
    masks = read_masks(scores, weights.zeroed, reader)
    if masks is None:
        return None
    if scores.temperatures and any(value_of(x).dtype != dtype for x in (*written[:2], scores.product)):
        return None
    q, k, v = (of_dtype(end, x, dtype) for x in written)
    k = k if is_transposition(keys) else insert_call(end, aten.transpose.int, k, -2, -1)
    q, k = tempered(end, q, k, scores.temperatures)
    return Attention(
        nodes=nodes,
        q=q,
        k=k,
        v=v,
        mask=written_mask(end, masks, value_of(scores.product).dtype),
        scale=scores.scale,
        softcap=scores.softcap,
        dropout=dropout,
        sinks=None if with_sinks is None else of_heads(end, with_sinks.column, num_heads_of(q_shape), q),
        fill=masks.fill,
    )


def tempered(before: fx.Node, q: fx.Node, k: fx.Node, temperatures: tuple[Temperature, ...]) -> tuple[fx.Node, fx.Node]:
    """Return queries and keys with the factors of their scores."""
    for each in temperatures:
        target = aten.div.Tensor if each.is_divisor else aten.mul.Tensor
        if each.is_of_queries:
            q = insert_call(before, target, q, each.tensor)
        else:
            rows = value_of(each.tensor).dim() > 1
            column = insert_call(before, aten.transpose.int, each.tensor, -2, -1) if rows else each.tensor
            column = column if rows else insert_call(before, aten.unsqueeze.default, column, -1)
            k = insert_call(before, target, k, column)
    return q, k


def num_heads_of(shape: torch.Size) -> int:
    """Return the heads of operands `[B, H, S, D]`, or of `[B, S, D]`, which have one."""
    return shape[1] if len(shape) == 4 else 1


def are_needed(nodes: tuple[fx.Node, ...], has_dropout: bool) -> bool:
    """Tell whether scores or weights of an attention, its nodes in order, are used otherwise too, and so are there anyway.

    Those of which no gradient is taken are computed for that alone, and not kept for backward. A weight is dropped only once.
    """
    seen, waiting = set(nodes), [user for node in nodes[:-1] for user in node.users]
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        is_cut = user.target is aten.detach.default or records_gradients(user) is False
        if not has_dropout and is_cut:
            continue
        if user.op == "output" or user.is_impure():
            return True
        waiting.extend(user.users)
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
