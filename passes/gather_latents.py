"""Gather latents: what keys and values are computed from is made whole on every rank, in place of keys and values.

before  k, v = aten.split(aten.linear(c, up)...)                         # strategy: latent
        o = cp.attention(q, k, v, ...)
after   w = cp.whole_tokens(c)                                           # gathered, once it is placed
        k, v = aten.split(aten.linear(w, up)...)                         # of all tokens, again in backward
        o = cp.attention(q, k, v, ...)
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.annotation import annotate, annotation
from cpcompile.call import Call, value_of
from cpcompile.emit import keep_source
from cpcompile.errors import module_path
from cpcompile.patterns.latent import Latent, find_latent
from cpcompile.plan import Plan
from cpcompile.sites import attention_nodes

cp = torch.ops.cpcompile


def gather_latents(gm: fx.GraphModule, *, plan: Plan) -> int:
    """Return of how many attentions the latent will travel. Runs before `place_tokens`."""
    count = 0
    for number, node in enumerate(attention_nodes(gm)):
        latent = find_latent(node) if annotation(node).strategy == "latent" else None
        if latent is not None and any(value.target is not cp.whole_tokens.default for value in latent.cut):
            expand_whole(node, latent, number)
            count += 1
    return count


def expand_whole(node: fx.Node, latent: Latent, number: int) -> None:
    """Let one attention take keys and values that are computed from whole values; other users keep the sharded ones.

    Whole keys and values would fill the memory if all layers kept them for backward: they are computed there again.
    """
    new = {value: whole(value, node) for value in latent.cut}
    for old in latent.expansion:
        with node.graph.inserting_after(old):
            copy = node.graph.node_copy(old, lambda operand: new.get(operand, operand))
        copy.meta = dict(old.meta)
        annotate(copy, origin=annotation(old).origin or old.name)
        if "recompute" not in copy.meta:
            copy.meta |= {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": number}
        new[old] = copy
    call = Call.of(node)
    node.args, node.kwargs = call.rebound({name: new.get(call[name], call[name]) for name in ("k", "v")})
    for old in reversed(latent.expansion):
        if not old.users:
            node.graph.erase_node(old)


def whole(value: fx.Node, attention: fx.Node) -> fx.Node:
    """Return `value`, to be made whole."""
    last = value if value.op != "placeholder" else value.graph.find_nodes(op="placeholder")[-1]
    with value.graph.inserting_after(last):
        node = value.graph.call_function(cp.whole_tokens.default, (value,))
    keep_source(node, value)
    node.meta["val"] = value_of(value)
    reason = f"keys and values of {module_path(attention) or 'an attention'} are computed from it"
    annotate(node, site=attention.name, reason=reason)
    return node
