"""Block masks: which nodes of a Dynamo graph only say, in blocks, what the mask_mod of a flex attention says already.

`create_block_mask` runs the mask_mod under vmap at all places to list the blocks that hold any, for kernels that skip the
others. Flex attention is opened by its mask_mod, so these lists need not be traced; lists from elsewhere are kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.utils._pytree import tree_leaves

# Frames of the functions that list the blocks of the mask_mod that they put beside the lists.
_LISTING = re.compile(r'flex_attention\.py", line \d+, in (create_block_mask|_create_empty_block_mask)\n')


def unread_nodes(gm: fx.GraphModule, listed: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Return the nodes that need not run, those in bodies of checkpoints included; `listed` are inputs that are lists."""
    unread: set[fx.Node] = set()
    later: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.target is tag_activation_checkpoint:
            unread |= unread_nodes(body_of(node), [x for x, given in inputs_of(node) if is_listing(given, listed)])
        written = node.args[0] if getattr(node.target, "__name__", "") == "setitem" else None
        users = [user for user in (written or node).users if user in later]
        if (users or is_listing(node)) and all(
            user in unread or not reads(user, node, listed, unread) for user in users
        ):
            unread.add(node)
        later.add(node)
    return unread | idle_levels(gm, unread)


def reads(user: fx.Node, node: fx.Node, listed: Collection[fx.Node], unread: Collection[fx.Node]) -> bool:
    """Tell whether one of the users of a node needs its value."""
    if user.target is torch.ops.higher_order.flex_attention:
        given: Any = user.args
        lists = given[4][2:-3]  # of keys for each query: 4, then of queries for each key, which say the same
        needed = () if all(is_listing(x, listed) for x in lists if x is not None) else lists[:4]
        return node in tree_leaves((given[:4], given[4][:2], needed, given[4][-3:], given[5:]))
    if user.target is tag_activation_checkpoint:
        inside = [inner for inner, given in inputs_of(user) if given is node]
        return not inside or any(inner not in unread for inner in inside)
    return True


def is_listing(node: Any, listed: Collection[fx.Node] = ()) -> bool:
    """Tell whether a node lists blocks of a mask_mod that flex attention is given too."""
    return isinstance(node, fx.Node) and (node in listed or bool(_LISTING.search(node.meta.get("stack_trace") or "")))


def body_of(checkpoint: fx.Node) -> fx.GraphModule:
    """Return the graph that a checkpoint runs."""
    body = getattr(checkpoint.graph.owning_module, checkpoint.args[0].target)  # type: ignore[union-attr, arg-type]
    assert isinstance(body, fx.GraphModule)
    return body


def inputs_of(checkpoint: fx.Node) -> list[tuple[fx.Node, Any]]:
    """Return (input of the body, what the checkpoint gives) pairs."""
    placeholders = [node for node in body_of(checkpoint).graph.nodes if node.op == "placeholder"]
    return list(zip(placeholders, checkpoint.args[1:], strict=True))


def idle_levels(gm: fx.GraphModule, unread: Collection[fx.Node]) -> set[fx.Node]:
    """Return the nodes that open and close levels of vmap between which nothing runs."""
    idle: set[fx.Node] = set()
    opened: list[tuple[fx.Node, int]] = []
    num_run = 0
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", "")
        if name == "_vmap_increment_nesting":
            opened.append((node, num_run))
        elif name == "_vmap_decrement_nesting":
            opening, num_before = opened.pop()
            idle |= {opening, node} if num_before == num_run else set()
        elif node not in unread:
            num_run += 1
    return idle
