"""Cut hidden rows: where a fill hides every key of a query, its scores are constants, and no gradient goes through them.

before  mask = aten.where(visible, 0, finfo.min)                        # of aten.masked_fill(scores, ~visible, finfo.min)
        out = cpcompile.attention(q, k, v, mask, ...)
after   sees_any = aten.any(mask > finfo.min / 2, -1, keepdim=True)
        out = cpcompile.attention(aten.where(sees_any, q, 0), k, v, mask, ...)

A number that is added changes such a row as little as one that replaces its scores: they are all the least number, and the row is
the mean of all values. But an addition passes the gradient on to queries and keys, and a fill does not. A query of zeros has the
same scores, and takes and gives no gradient.
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


def cut_hidden_rows(gm: fx.GraphModule) -> int:
    """Return how many attentions have rows that may be hidden.

    Needs: masks that are lifted (`lift_masks`), which leaves those of such rows as they are.
    Gives: attentions whose mask is added, with queries of zeros where it hides every key.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default):
        call = Call.of(node)
        if annotation(node).fill and call["mask"] is not None:
            node.args, node.kwargs = call.rebound({"q": without_hidden_rows(call, annotation(node).fill)})
            annotate(node, fill=0.0)
            count += 1
    return count


def without_hidden_rows(call: Call, fill: float) -> fx.Node:
    """Return the queries, zeros where every key is hidden by the number `fill`."""
    mask = call["mask"]
    sees = insert_call(call.node, aten.gt.Scalar, mask, fill / 2)
    sees_any = insert_call(call.node, aten.any.dim, sees, -1, True)
    zero = insert_call(call.node, aten.new_zeros.default, call["q"], [])
    assert value_of(mask).dtype.is_floating_point
    return insert_call(call.node, aten.where.self, sees_any, call["q"], zero)
