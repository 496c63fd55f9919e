"""Locate shown: a value that is shown, and of which a rank holds some tokens, says which these are.

before  y = cp.show(x, "hidden", gradient, pauses)                                   # x, y: Sharded(1)
after   y = cp.show_tokens(x, "hidden", gradient, pauses, 1, 1, 0, 0, 32, "zig_zag", 4, group)    # x, y: Sharded(1)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.ir.annotation import annotation
from cpcompile.ir.insertion import insert_copy, replace_uses
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths, Plan

cp = torch.ops.cpcompile


def locate_shown(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many values say which tokens they are.

    Needs: the placement of every value (`place_tokens`).
    Gives: `cp.show_tokens`; what is whole, or sharded in another way than the layout's, stays `cp.show`, and knows the ranks.
    """
    count = 0
    for node in gm.graph.find_nodes(op="call_function", target=cp.show.default):
        at = annotation(node).placement
        call = Call.of(node)
        if not isinstance(at, Sharded) or not Lengths.of(gm, at.sequence).is_of_tokens:
            node.args = (*(call[name] for name in ("x", "name", "gradient", "pauses")), plan.world_size, plan.group)
            continue
        lengths = Lengths.of(gm, at.sequence)
        shown = call["x"], call["name"], call["gradient"], call["pauses"], at.dim, at.inner, at.front, at.back
        with gm.graph.inserting_before(node):
            located = insert_copy(
                gm.graph, cp.show_tokens.default, (*shown, lengths.total, *lengths.axis(plan)), node, at
            )
        replace_uses(node, located)
        gm.graph.erase_node(node)
        count += 1
    return count
