"""Sum input gradients: a whole input that requires gradients gets the gradient of all ranks, not of this rank's tokens.

before  h = aten.linear(inputs_embeds, w)
after   x = cp.sum_gradient(inputs_embeds, 1.0, P, "cp"); h = aten.linear(x, w)
"""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.annotation import annotate
from cpcompile.plan import Plan

cp = torch.ops.cpcompile


def sum_input_gradients(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return how many inputs were changed. Parameters are not: their gradients are added up in buckets after backward."""
    count = 0
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    for node in list(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        is_input = isinstance(value, torch.Tensor) and value.requires_grad and not isinstance(value, torch.nn.Parameter)
        if not is_input or plan.world_size == 1:
            continue
        with gm.graph.inserting_after(last):
            arguments = (node, 1 / plan.gradient_scale, plan.world_size, plan.group)
            new = gm.graph.call_function(cp.sum_gradient.default, arguments)
        new.meta = dict(node.meta)
        annotate(new, origin=node.name)
        node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        count += 1
    return count
