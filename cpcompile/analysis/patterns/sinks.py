"""Sinks of attention written out: a column of logits beside the scores, whose weights are dropped after the softmax.

scores = aten.cat([scores, sinks], -1)                          # sinks: [B, H, S, 1], the same for all queries of a head
weights = aten.slice(aten.softmax(scores - max(scores), -1), -1, 0, -1)

The column may come before the scores, and be one number for all: `aten.pad(scores, [0, 1])`, as in `exp(x) / (1 + sum(exp(x)))`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.patterns.nodes import PADS, is_conversion, records_gradients, source
from cpcompile.analysis.patterns.scores import maximum_of_rows
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_EXPANSIONS = {aten.expand.default, aten.expand_as.default, aten.broadcast_to.default}


@dataclass(frozen=True, slots=True)
class SinkColumn:
    """Scores with a column of sinks behind or before them, and the nodes between the scores and the softmax, in their order.

    The sinks are a node `[1, H | 1, 1, 1]`, or one number.
    """

    scores: fx.Node
    column: fx.Node | float
    nodes: tuple[fx.Node, ...]
    is_first: bool = False


def read_sinks(logits: fx.Node, reader: Reader) -> SinkColumn | None:
    """Read what goes into a softmax as scores and sinks; taking the largest from each row changes no weight."""
    nodes = [logits]
    while is_conversion(nodes[0]):
        nodes.insert(0, source(nodes[0]))
    joined = unshifted(nodes[0])
    nodes = nodes if joined is nodes[0] else [joined, *nodes]
    if joined.target in PADS:
        return read_padded(joined, tuple(nodes))
    return read_joined(joined, tuple(nodes), reader) if joined.target is aten.cat.default else None


def read_joined(joined: fx.Node, nodes: tuple[fx.Node, ...], reader: Reader) -> SinkColumn | None:
    """Read two tensors that are joined along the keys, one of which is the column."""
    call, rank = Call.of(joined), value_of(joined).dim()
    if call["dim"] not in (-1, rank - 1) or len(call["tensors"]) != 2:
        return None
    for is_first in (False, True):
        scores, repeated = reversed(call["tensors"]) if is_first else call["tensors"]
        if not statically_known_true(value_of(repeated).shape[-1] == 1):
            continue
        number = constant(reader, repeated)
        if number is not None:
            return SinkColumn(scores, number, nodes, is_first)
        column = without_rows(repeated) if rank == 4 else None
        # Repeated where gradients are off, sinks have none.
        if column is not None and records_gradients(repeated) == records_gradients(joined):
            return SinkColumn(scores, column, nodes, is_first)
    return None


def read_padded(joined: fx.Node, nodes: tuple[fx.Node, ...]) -> SinkColumn | None:
    """Read scores that are padded with one number."""
    call = Call.of(joined)
    number, is_constant = call["value"] or 0, call.arguments.get("mode", "constant") == "constant"
    if list(call["pad"]) not in ([0, 1], [1, 0]) or not is_constant or not isinstance(number, int | float):
        return None
    return SinkColumn(call["self"], float(number), nodes, is_first=call["pad"][0] == 1)


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


def drops_column(weights: fx.Node, softmax: fx.Node, is_first: bool) -> bool:
    """Tell whether a node takes all columns of a softmax but the last, or but the first."""
    if weights.target not in (aten.slice.Tensor, aten.narrow.default) or weights.args[0] is not softmax:
        return False
    call = Call.of(weights)
    all_rows = value_of(softmax).shape[-1]
    return (
        call["dim"] in (-1, value_of(softmax).dim() - 1)
        and (call["start"] or 0) == int(is_first)
        and call.arguments.get("step", 1) == 1
        and statically_known_true(value_of(weights).shape[-1] == all_rows - 1)
    )


def of_heads(before: fx.Node, column: fx.Node | float, num_heads: int, like: fx.Node) -> fx.Node:
    """Return the sinks `[H]`; those of one number are of the type of `like`."""
    if not isinstance(column, fx.Node):
        return insert_call(before, aten.new_full.default, like, [num_heads], column)
    flat = insert_call(before, aten.reshape.default, column, [-1])
    return insert_call(before, aten.expand.default, flat, [num_heads]) if value_of(flat).shape[0] == 1 else flat
