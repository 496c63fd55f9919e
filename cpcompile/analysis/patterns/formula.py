"""Attention as its formula: the nodes of `softmax(mask(q @ k^T * scale)) @ v`, for what one operator cannot say."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.attention import Attention, num_heads
from cpcompile.analysis.patterns.nodes import converted
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten


def written_out(found: Attention) -> fx.Node:
    """Return the attention written out before its last node: a row that sees no key is 0, scores are in float32 or float64."""
    end = found.nodes[-1]
    scores = products(end, found.q, found.k, found.scale)
    if found.is_causal:
        queries, keys = coordinate(end, found.q, -2, [-1, 1]), coordinate(end, found.k, -2, [1, -1])
        scores = masked(end, scores, insert_call(end, aten.le.Tensor, keys, queries))
    if found.mask is not None:
        scores = masked(end, scores, found.mask)
    return weighted(end, scores, found.v, value_of(end).dtype, found.dropout)


def products(before: fx.Node, q: fx.Node, k: fx.Node, scale: float) -> fx.Node:
    """Return the scaled products of queries and keys, each key head for as many query heads as share it."""
    dtype = torch.float64 if value_of(q).dtype == torch.float64 else torch.float32
    k = converted(before, for_heads_of(before, q, k), dtype)
    transposed = insert_call(before, aten.transpose.int, k, -2, -1)
    scores = insert_call(before, aten.matmul.default, converted(before, q, dtype), transposed)
    return scores if scale == 1 else insert_call(before, aten.mul.Tensor, scores, scale)


def for_heads_of(before: fx.Node, queries: fx.Node, keys: fx.Node) -> fx.Node:
    """Return keys or values with as many heads as the queries; one head broadcasts."""
    if value_of(queries).dim() < 4 or num_heads(keys) in (1, num_heads(queries)):
        return keys
    return insert_call(before, aten.repeat_interleave.self_int, keys, num_heads(queries) // num_heads(keys), -3)


def masked(before: fx.Node, scores: fx.Node, mask: fx.Node) -> fx.Node:
    """Return the scores under a mask: a boolean that is true to attend, or a number to add."""
    if value_of(mask).dtype is torch.bool:
        return insert_call(before, aten.where.ScalarOther, mask, scores, float("-inf"))
    return insert_call(before, aten.add.Tensor, scores, converted(before, mask, value_of(scores).dtype))


def weighted(before: fx.Node, scores: fx.Node, v: fx.Node, dtype: torch.dtype, dropout: float = 0.0) -> fx.Node:
    """Return the values weighted by the softmax of the scores, in `dtype`."""
    weights = converted(before, insert_call(before, aten._safe_softmax.default, scores, -1), dtype)
    if dropout:
        weights = insert_call(before, aten.dropout.default, weights, dropout, True)
    return insert_call(before, aten.matmul.default, weights, converted(before, for_heads_of(before, scores, v), dtype))


def coordinate(before: fx.Node, operand: fx.Node, dim: int, shape: list[int]) -> fx.Node:
    """Return the index along a dim of an operand, viewed in a shape that broadcasts to the scores."""
    with value_of(operand).fake_mode:
        index = insert_call(before, aten.arange.default, size_of(before, operand, dim), device=value_of(operand).device)
    return insert_call(before, aten.view.default, index, shape)


def size_of(before: fx.Node, node: fx.Node, dim: int) -> Any:
    """Return a size as an argument: a number, or the node that reads a symbolic one."""
    size = value_of(node).shape[dim]
    return size if isinstance(size, int) else insert_call(before, aten.sym_size.int, node, dim % value_of(node).dim())
