"""Stack writes: a tensor that is written entry by entry is a stack of what is written.

before  y = aten.zeros_like(x); y_1 = aten.select_scatter(y, a, 1, 0); y_2 = aten.select_scatter(y_1, b, 1, 1)
after   y_2 = aten.stack([a, b], 1)                                    # y has two entries along dim 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile.ir.insertion import insert_call, replace_uses
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


def stack_writes(gm: fx.GraphModule) -> int:
    """Return how many tensors were stacked.

    Needs: writes are operators that return values (`functionalise_writes`).
    Gives: `stack` in place of a chain of `select_scatter` that writes every entry of a dim.
    """
    count = 0
    for node in reversed(gm.graph.find_nodes(op="call_function", target=aten.select_scatter.default)):
        entries = entries_of(node)
        if entries is None:
            continue
        replace_uses(node, insert_call(node, aten.stack.default, entries, Call.of(node).dim("dim", "self")))
        gm.graph.erase_node(node)
        count += 1
    return count


def entries_of(last: fx.Node) -> list[fx.Node] | None:
    """Return what a chain of writes that ends here writes to each entry, if it writes to all of them."""
    if not last.users:
        return None
    call = Call.of(last)
    dim, size = call.dim("dim", "self"), call.shape("self")[call.dim("dim", "self")]
    entries: dict[int, fx.Node] = {}
    node: Any = last
    while node.target is aten.select_scatter.default and isinstance(size, int) and len(entries) < size:
        call = Call.of(node)
        index = call["index"]
        if (
            call.dim("dim", "self") != dim
            or not isinstance(index, int)
            or value_of(call["src"]).dtype != value_of(last).dtype
        ):
            return None
        entries.setdefault(index % size, call["src"])
        node = call["self"]
    return [entries[i] for i in range(size)] if isinstance(size, int) and len(entries) == size else None
