"""Sinks of attention written out: a column of logits beside the scores, whose weights are dropped after the softmax.

scores = aten.cat([scores, sinks], -1)                          # sinks: [B, H, S, 1], the same for all queries of a head
weights = aten.slice(aten.softmax(scores - max(scores), -1), -1, 0, -1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.patterns.nodes import is_conversion, records_gradients, source
from cpcompile.analysis.patterns.scores import maximum_of_rows
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_EXPANSIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}


@dataclass(frozen=True, slots=True)
class SinkColumn:
    """Scores with a column of sinks behind them, and the nodes between the scores and the softmax, in their order."""

    scores: fx.Node
    column: fx.Node
    nodes: tuple[fx.Node, ...]


def read_sinks(logits: fx.Node) -> SinkColumn | None:
    """Read what goes into a softmax as scores and sinks; taking the largest from each row changes no weight."""
    nodes = [logits]
    while is_conversion(nodes[0]):
        nodes.insert(0, source(nodes[0]))
    joined = unshifted(nodes[0])
    if joined.target is not aten.cat.default:
        return None
    nodes = nodes if joined is nodes[0] else [joined, *nodes]
    call, rank = Call.of(joined), value_of(joined).dim()
    if call["dim"] not in (-1, rank - 1) or len(call["tensors"]) != 2 or rank != 4:
        return None
    scores, repeated = call["tensors"]
    column = without_rows(repeated)
    # Repeated where gradients are off, sinks have none.
    if column is None or records_gradients(repeated) != records_gradients(joined):
        return None
    return SinkColumn(scores, column, tuple(nodes))


def unshifted(logits: fx.Node) -> fx.Node:
    """Return x of `x - max(x, -1)`, or the logits."""
    if logits.target is not aten.sub.Tensor:
        return logits
    call = Call.of(logits)
    is_shift = is_tensor(call["other"]) and call["alpha"] == 1 and maximum_of_rows(call["other"]) is call["self"]
    return source(logits) if is_shift else logits


def without_rows(column: fx.Node) -> fx.Node | None:
    """Return what a column `[B, H, S, 1]` repeats for all queries and sequences, `[1, H | 1, 1, 1]`, or None."""
    while column.target in _EXPANSIONS or is_conversion(column):
        column = source(column)
    sizes = value_of(column).shape
    is_per_head = all(i == len(sizes) - 3 or statically_known_true(size == 1) for i, size in enumerate(sizes))
    return column if is_per_head and len(sizes) <= 4 else None


def drops_column(weights: fx.Node, softmax: fx.Node) -> bool:
    """Tell whether a node takes all columns of a softmax but the last."""
    if weights.target is not aten.slice.Tensor or weights.args[0] is not softmax:
        return False
    call = Call.of(weights)
    all_rows = value_of(softmax).shape[-1]
    return (
        call["dim"] in (-1, value_of(softmax).dim() - 1)
        and call["start"] in (None, 0)
        and call["step"] == 1
        and statically_known_true(value_of(weights).shape[-1] == all_rows - 1)
    )


def of_heads(before: fx.Node, column: fx.Node, num_heads: int) -> fx.Node:
    """Return the sinks `[H]`."""
    flat = insert_call(before, aten.reshape.default, column, [-1])
    return insert_call(before, aten.expand.default, flat, [num_heads]) if value_of(flat).shape[0] == 1 else flat
