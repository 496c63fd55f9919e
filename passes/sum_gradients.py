"""Sum gradients: what every rank holds whole has the sum of all ranks as its gradient, begun where backward has it.

before  y = aten.linear(x, weight)
after   own = cp.sum_gradient(weight, site, 0); y = aten.linear(x, own)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from cpcompile.ir.annotation import annotate


def sum_gradients(gm: fx.GraphModule, *, summed: Sequence[str], site: int) -> int:
    """Return how many inputs have sums. `summed` names them, `site` is the number of this graph at run time.

    Needs: a graph of all ranks, with the rows of sharded parameters (`unshard_parameters`).
    Gives: `cp.sum_gradient` at each of them.
    """
    nodes = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    count = 0
    for index, name in enumerate(summed):
        node = nodes[name]
        if not node.users:
            continue
        # At the first use: autograd runs backward in the opposite order, and so the sum before what is further up.
        with gm.graph.inserting_before(min(node.users)):
            own = gm.graph.call_function(torch.ops.cpcompile.sum_gradient.default, (node, site, index))
        node.replace_all_uses_with(own, delete_user_cb=lambda user, own=own: user is not own)
        own.meta["val"] = node.meta["val"]
        annotate(own, origin=node.name)
        count += 1
    return count
