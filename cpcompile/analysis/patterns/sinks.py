"""Sinks of attention written out: a column of logits beside the scores, whose weights are dropped after the softmax.

scores = aten.cat([scores, sinks], -1)                          # sinks: [B, H, S, 1], the same for all queries of a head
weights = aten.slice(aten.softmax(scores - max(scores), -1), -1, 0, -1)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.patterns.nodes import is_conversion, source
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

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
    after: tuple[fx.Node, ...] = ()
    while is_conversion(logits) and len(logits.users) == 1:
        logits, after = source(logits), (logits, *after)
    joined, shift = unshifted(logits)
    if joined.target is not aten.cat.default or len(joined.users) != (2 if shift else 1):
        return None
    call, rank = Call.of(joined), value_of(joined).dim()
    if call["dim"] not in (-1, rank - 1) or len(call["tensors"]) != 2 or rank != 4:
        return None
    scores, repeated = call["tensors"]
    column = without_rows(repeated)
    # Repeated where gradients are off, sinks have none.
    if column is None or records_gradients(repeated) != records_gradients(joined):
        return None
    return SinkColumn(scores, column, (joined, *shift, *after))


def records_gradients(node: fx.Node) -> object:
    """Return what gradients were last set to before a node, None where they never are."""
    while node.op != "root":
        if getattr(node.target, "__name__", "") == "_set_grad_enabled":
            return node.args[0]
        node = node.prev
    return None


def unshifted(logits: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Return (x, the nodes that subtract) for `x - max(x, -1)`, or the logits and none."""
    if logits.target is not aten.sub.Tensor or len(logits.users) != 1:
        return logits, ()
    call = Call.of(logits)
    largest: fx.Node = call["other"]
    nodes: tuple[fx.Node, ...] = (logits,)
    while isinstance(largest, fx.Node) and largest is not call["self"]:
        # The places of the largest, which nothing reads.
        unused = [user for user in largest.users if user.target is operator.getitem and not user.users]
        if len(largest.users) != 1 + len(unused):
            break
        is_max = largest.target in (aten.max.dim, aten.amax.default)
        is_passed_on = largest.target in (aten.detach.default, operator.getitem)
        if not is_max and not is_passed_on:
            break
        nodes = (largest, *unused, *nodes)
        if is_max:
            maximum = Call.of(largest)
            is_of_rows = maximum["dim"] in (-1, 3, [-1], [3]) and maximum["keepdim"]
            is_last = maximum["self"] is call["self"] and is_of_rows and call["alpha"] == 1
            return (call["self"], nodes) if is_last else (logits, ())
        largest = source(largest)
    return logits, ()


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
