"""Tables: values that depend on the place of a token in its row only, read by its place in its document instead.

before  cos = aten.cos(aten.mul(aten.arange(S), rates)); y = aten.mul(x, cos)                  # x: [B, H, S, D], cos: [S, D]
after   here = aten.view(aten.embedding(cos, positions), [B, 1, S, D]); y = aten.mul(x, here)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.boundaries import size_of
from cpcompile.ir.annotation import annotate
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import Call, expression, is_tensor, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.rules import RULES

aten = torch.ops.aten

RANGES = {aten.arange.default, aten.arange.start, aten.arange.start_step}
CONSTANTS = {
    *(aten.zeros.default, aten.ones.default, aten.full.default, aten.zeros_like.default, aten.ones_like.default),
    *(aten.full_like.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default),
}
# Arguments that say how large a tensor is, not what it holds.
SIZES = {"size", "sizes", "shape", "end", "repeats", "split_size", "length"}


def is_prefix(node: fx.Node, dim: int, length: torch.SymInt) -> bool:
    """Tell whether a value that no input determines has, along `dim`, the same elements for every length, only more or fewer.

    Those of a document that begins anywhere are then the first ones.
    """
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    call, dims = Call.of(node), value_of(node).dim()
    if node.target in RANGES:
        return not any(depends(call.arguments.get(name), length) for name in ("start", "step"))
    if node.target in CONSTANTS:
        return not depends(call.arguments.get("fill_value"), length)
    if node.target is aten.slice.Tensor and call.dim("dim", "self") == dim:
        start = call["start"] or 0
        is_from_front = isinstance(start, int) and start >= 0
        source = call["self"]
        return is_from_front and (not depends(source, length) or is_prefix(source, dim, length))
    if node.target is aten.cumsum.default and call.dim("dim", "self") == dim:
        return is_prefix(call["self"], dim, length)
    if node.target not in RULES or any(depends(x, length) for x in numbers(call)):
        return False
    decision = RULES[node.target].pull(call, Sharded(dim), length)
    if decision is None or decision.lower is not None or dims == 0:
        return False
    for name, operand in call.operands():
        at = decision.operands.get(name)
        if isinstance(at, Sharded):
            if at.inner != 1 or not at.covers_all or not is_prefix(operand, at.dim, length):
                return False
        elif depends(operand, length):
            return False
    return True


def numbers(call: Call) -> list[Any]:
    """Return the arguments that are numbers of the graph and no sizes."""
    named = [x for name, x in call.arguments.items() if name not in SIZES]
    return [x for x in named if isinstance(x, fx.Node) and not is_tensor(x)]


def depends(argument: Any, length: torch.SymInt) -> bool:
    """Tell whether an argument depends on the number of tokens."""
    symbols, seen, stack = expression(length).free_symbols, set[fx.Node](), [argument]
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        value = value_of(node)
        sizes = list(value.shape) if isinstance(value, torch.Tensor) else [value]
        if any(isinstance(size, torch.SymInt) and expression(size).free_symbols & symbols for size in sizes):
            return True
        stack.extend(node.all_input_nodes)
    return False


def at_positions(table: fx.Node, dim: int, positions: fx.Node, rank: int) -> fx.Node | None:
    """Return the rows of `table`, whose tokens are along `dim`, at the positions `[B, S]` of each row of the batch.

    The result broadcasts to `rank` dims of which the first is the batch; None where the table has no such form.
    """
    shape, before = value_of(table).shape, table.next
    lead = rank - len(shape) + dim  # dims in front of the tokens, of what the table meets
    if lead < 1:
        return None
    batch = value_of(positions).shape[0]
    if any(size != 1 for size in shape[:dim]):
        is_batched = lead == dim and str(shape[0]) == str(batch)
        return gathered(table, dim, positions) if is_batched else None
    for node in ancestors(table):
        annotate(node, stays_whole=True)
    rows = insert_call(before, aten.reshape.default, table, [size_of(before, table, dim), -1])
    here = insert_call(before, aten.embedding.default, rows, positions)
    sizes = [size_of(before, positions, i) for i in (0, 1)]
    behind = [size_of(before, table, i) for i in range(dim + 1, len(shape))]
    out = insert_call(before, aten.reshape.default, here, [sizes[0], *[1] * (lead - 1), sizes[1], *behind])
    for new in (rows, here, out):
        keep_source(new, table)
    return out


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return the tensors that a node is computed from, itself included."""
    found, stack = {node}, [node]
    while stack:
        for operand in stack.pop().all_input_nodes:
            if operand not in found and isinstance(value_of(operand), torch.Tensor):
                found.add(operand)
                stack.append(operand)
    return found


def gathered(table: fx.Node, dim: int, positions: fx.Node) -> fx.Node:
    """Return the rows of a table that has one for each row of the batch."""
    before, rank = table.next, value_of(table).dim()
    sizes = [size_of(before, positions, i) for i in (0, 1)]
    shape = [sizes[0], *[1] * (dim - 1), sizes[1], *[1] * (rank - dim - 1)]
    index = insert_call(before, aten.reshape.default, positions, shape)
    index = insert_call(before, aten.expand.default, index, [size_of(before, table, i) for i in range(rank)])
    return insert_call(before, aten.gather.default, table, dim, index)
