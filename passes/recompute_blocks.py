"""Recompute blocks: some of a model's repeated blocks keep what enters them, and compute the rest again in backward.

before  h = block 0 (x); y = block 1 (h)
after   h = block 0 (x), whose nodes are tagged as those of an activation checkpoint; y = block 1 (h)
"""

from __future__ import annotations

import itertools
import math

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.errors import ConfigError, clean_path, module_path
from cpcompile.ir.operator_call import is_tensor, is_view


def recompute_blocks(gm: fx.GraphModule, *, memory_budget: float) -> int:
    """Return how many blocks are computed again: the first ones, as many as a budget between 0 (all) and 1 (none) asks for.

    A block is a module in a list of modules, the outermost list of several; one that has activation checkpoints of the user's
    counts as computed again. Each saves as much as the next, so that less budget never takes more memory.

    Needs: a graph of every rank, before parameters are gathered (`unshard_parameters`).
    Gives: the tags of activation checkpoints. Results that later nodes read are kept.

    Raises:
        ConfigError: the model has no list of modules.
    """
    blocks = blocks_of(gm)
    if not blocks:
        raise ConfigError(
            f"memory_budget={memory_budget}: the model has no list of blocks (ModuleList, Sequential) to compute again in "
            "backward. Use torch.utils.checkpoint in the model, and leave memory_budget at 1."
        )
    again = list(blocks.values())[: num_again(memory_budget, len(blocks))]
    numbers = [node.meta["ac_graph_id"] for node in gm.graph.nodes if "ac_graph_id" in node.meta]
    number = itertools.count(max(numbers, default=0) + 1)
    for nodes in again:
        if not any("ac_graph_id" in node.meta for node in nodes):
            tag(nodes, next(number))
    return len(again)


def num_again(memory_budget: float, num_blocks: int) -> int:
    """Return how many of a model's blocks a budget has computed again."""
    return math.ceil((1 - memory_budget) * num_blocks - 1e-9)


def blocks_of(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return the nodes of each block, by its path: a member of the outermost list, or of one that it mostly is."""
    return divided([node for node in gm.graph.nodes if node.op == "call_function"], 0)


def divided(nodes: list[fx.Node], depth: int) -> dict[str, list[fx.Node]]:
    """Return the nodes of each member of the lists at a depth, those taken apart that are lists of blocks themselves."""
    found: dict[str, list[fx.Node]] = {}
    members: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if path := member_of(node, depth):
            members.setdefault(path, []).append(node)
    for path, own in members.items():
        inner = divided(own, depth + 1)
        classes = {class_of(of_one[0], of) for of, of_one in inner.items()}
        is_of_blocks = len(inner) > 1 and len(classes) == 1 and 2 * sum(map(len, inner.values())) > len(own)
        found |= inner if is_of_blocks else {path: own}
    return found


def member_of(node: fx.Node, depth: int) -> str:
    """Return the path of the member of a list that a node is in, the `depth`-th from outside, or ''."""
    parts = module_path(node).split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: places[depth] + 1]) if len(places) > depth else ""


def class_of(node: fx.Node, path: str) -> str:
    """Return the class of a module that a node is in; its path where that is not known."""
    classes = {clean_path(str(of)): str(kind) for of, kind in node.meta.get("nn_module_stack", {}).values()}
    return classes.get(path, path)


def tag(nodes: list[fx.Node], number: int) -> None:
    """Have nodes computed again in backward, as those of one activation checkpoint."""
    inside = set(nodes)
    for node in nodes:
        if "recompute" not in node.meta:  # where documents begin is kept
            node.meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=number)
    for node in nodes:
        if is_tensor(node) and any(user not in inside for user in node.users):
            while is_view(node.target) and node.all_input_nodes[0] in inside:
                node = node.all_input_nodes[0]
            node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
