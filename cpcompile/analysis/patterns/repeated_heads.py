"""KV heads that are repeated for grouped queries: `repeat_interleave`, or `expand` and a reshape."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import is_conversion, same_shape, source
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

_REGROUPINGS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}


def unrepeated(before: fx.Node, node: fx.Node) -> fx.Node:
    """Return `[B, K, S, D]` of which `node` `[B, K * n, S, D]` repeats every head n times, or `node`."""
    if value_of(node).dim() != 4:
        return node
    if node.target is aten.repeat_interleave.self_int and Call.of(node)["dim"] in (1, -3):
        return source(node)
    if node.target not in _REGROUPINGS:
        return node
    expanded = source(node)
    while is_conversion(expanded):
        expanded = source(expanded)
    if expanded.target is not aten.expand.default or value_of(expanded).dim() != 5:
        return node
    batch, heads, copies, *rest = value_of(expanded).shape
    is_repeat = same_shape(value_of(node).shape, (batch, heads * copies, *rest))
    if not is_repeat or not same_shape(value_of(source(expanded)).shape, (batch, heads, 1, *rest)):
        return node
    return without_copies(before, source(expanded))


def without_copies(before: fx.Node, one_copy: fx.Node) -> fx.Node:
    """Return `[B, K, 1, S, D]` without its third dim."""
    inner = one_copy
    while inner.target is aten.slice.Tensor and same_shape(value_of(inner).shape, value_of(source(inner)).shape):
        inner = source(inner)
    if inner.target is aten.unsqueeze.default and Call.of(inner)["dim"] in (2, -3):
        return source(inner)
    return insert_call(before, aten.squeeze.dim, one_copy, 2)
