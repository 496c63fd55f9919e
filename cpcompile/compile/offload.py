"""Offload: what blocks that are computed again keep for backward waits in host memory, and is back a block before it is needed.

forward   before  h = block(g); y = block(h); save(g, h)
          after   g' = to_host(g); h = block(g); wait_copy(g', g, [h]); y = block(h); save(g', h)
backward  before  dh = block(h, dy); dg = block(g, dh)
          after   g = from_host(g'); dh = block(h, dy); wait_copy(g, g', [dh]); dg = block(g, dh)

A copy runs while the next block is computed. What the last block keeps stays where it is: backward begins with it.

Where equal layers are calls of one function, such a call is a block: what it keeps are its operands and results, which are copied
around it.

torch's own switch, `torch._functorch.config.enable_activation_offloading` (read in 2.11 to 2.14), is not used: the current stream
waits for each copy where it begins, or for all of them at the end of forward, and holds what they are made of until then; reloads
are placed by the time that torch's own products take, in which our attention counts for nothing; views and members of tuples are
left out; and from 2.13 on host memory is freed in the first backward, so that there can be no second one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile.capture.lowering import placeholders
from cpcompile.compile.result_memory import body_of, invoke_subgraph, is_apart, readers_of, root_of
from cpcompile.ir.annotation import annotation
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import is_tensor, size_hint, value_of
from cpcompile.ir.placement import Sharded

cp = torch.ops.cpcompile
_TOKENS = "cpcompile_tokens"  # of `custom`, which compilers carry along


@dataclass(slots=True)
class _Kept:
    """What a block keeps for backward.

    Attributes:
        values: nodes of forward, in its order, each with the input of backward that holds it.
        late: those that are there only when all of the block has been computed, results of a call.
        first: the place of the node of backward that reads one of them first.
        behind: what backward has computed of gradients by then, if anything.
    """

    values: dict[fx.Node, fx.Node] = field(default_factory=dict)
    late: set[fx.Node] = field(default_factory=set)
    first: int = 0
    behind: list[fx.Node] = field(default_factory=list)


def note_tokens(graph: fx.Graph) -> None:
    """Have all that is made of each node known as of tokens, as far as it is; else gathered and cast weights look the same."""
    for node in graph.nodes:
        placement = annotation(node).placement
        if any(isinstance(each, Sharded) for each in (placement if isinstance(placement, tuple) else [placement])):
            node.meta["custom"] = (node.meta.get("custom") or {}) | {_TOKENS: True}


def move_to_host(forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, *, offload: str) -> int:
    """Return how many values wait in host memory between the halves of a program, of whose outputs a model returns the first.

    Args:
        offload: `inputs` moves what enters each block that is computed again, `all` also what is kept of its inside.
    """
    kept = kept_by_block(forward, backward, num_outputs, with_inside=offload == "all")
    copies = move_away(forward.graph, kept)
    bring_back(backward, kept, copies)
    for half in (forward, backward):
        half.graph.lint()
        half.recompile()
    return len(copies)


def is_in_host_memory(node: fx.Node) -> bool:
    """Tell whether a result of forward, or an input of backward, waits in host memory."""
    return node.target is cp.to_host.default or any(user.target is cp.from_host.default for user in node.users)


def kept_by_block(
    forward: fx.GraphModule, backward: fx.GraphModule, num_outputs: int, *, with_inside: bool
) -> list[_Kept]:
    """Return what each block keeps that no other reads, in the order of forward."""
    (output,) = forward.graph.find_nodes(op="output")
    returned = {root_of(node) for node in output.args[0][:num_outputs] if isinstance(node, fx.Node)}
    saved = set(output.args[0][num_outputs:])
    inputs = {node.name: node for node in placeholders(backward) if node.users}
    found: dict[Hashable, _Kept] = {}
    for node in forward.graph.nodes:
        root = root_of(node)
        if node not in saved or node.name not in inputs or root in returned or not is_of_tokens(root):
            continue
        block = block_that_reads(root)
        if block is not None and (with_inside or enters(root, block)):
            kept = found.setdefault(block, _Kept())
            kept.values[node] = inputs[node.name]
            if isinstance(block, fx.Node) and block == block_of(root):
                kept.late.add(node)
    place = {node: i for i, node in enumerate(backward.graph.nodes)}
    computed = gradients_computed(backward.graph)
    for kept in found.values():
        kept.first = min(place[user] for node in kept.values.values() for user in node.users)
        kept.behind = [node for node in computed if place[node] < kept.first][-1:]
    return list(found.values())


def is_of_tokens(node: fx.Node) -> bool:
    """Tell whether a node computes numbers of tokens, and any at all: some kernels return nothing in places."""
    is_noted = node.op == "call_function" and _TOKENS in (made_as(node).meta.get("custom") or {})
    return is_noted and is_tensor(node) and value_of(node).is_floating_point() and size_hint(value_of(node).numel()) > 0


def made_as(node: fx.Node) -> fx.Node:
    """Return the node inside of a call that makes what another takes from its results; any other node is its own."""
    if node.target is not operator.getitem or node.args[0].target is not invoke_subgraph:  # type: ignore[union-attr]
        return node
    call, index = node.args
    (returned,) = body_of(call).graph.find_nodes(op="output")  # type: ignore[arg-type]
    return returned.args[0][index]  # type: ignore[no-any-return]


def block_of(node: fx.Node) -> Hashable:
    """Return the block that a node is of: its number, or the call that some of it is computed again of; None for another."""
    call: Any = node.args[0] if node.target is operator.getitem else node
    if call.target is not invoke_subgraph:
        number: int | None = node.meta.get("ac_graph_id")
        return number
    return call if any("ac_graph_id" in x.meta for x in body_of(call).graph.nodes) else None


def block_that_reads(node: fx.Node) -> Hashable:
    """Return the block that reads a value, or made it if none reads it; None where there is not one."""
    blocks = {block_of(user) for user in readers_of(node)} - {None}
    if blocks:
        return blocks.pop() if len(blocks) == 1 else None
    return block_of(node)


def enters(node: fx.Node, block: Hashable) -> bool:
    """Tell whether a value comes from outside of the block that reads it; a call may have the end of one and the next."""
    made = made_as(node)
    return block != block_of(node) or block_that_reads(made) != block_of(made)


def gradients_computed(backward: fx.Graph) -> list[fx.Node]:
    """Return what is computed from gradients and stored in any case, in order; not what still travels between ranks."""
    depends = {node for node in backward.find_nodes(op="placeholder") if node.name.startswith("tangents")}
    found = []
    for node in backward.nodes:
        if node.op == "call_function" and not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            travels = getattr(node.target, "namespace", "").startswith("_c10d_functional")
            if is_tensor(node) and root_of(node) is node and is_apart(node) and not travels:
                found.append(node)
    return found


def move_away(graph: fx.Graph, kept: Sequence[_Kept]) -> dict[fx.Node, fx.Node]:
    """Copy values to host memory as soon as they are there, and return the copies. Those of the last block stay."""
    place = {node: i for i, node in enumerate(graph.nodes)}
    (output,) = graph.find_nodes(op="output")
    copies: dict[fx.Node, fx.Node] = {}
    under_way, late = list[fx.Node](), list[fx.Node]()
    for own, following in itertools.zip_longest(kept, kept[1:]):
        first = next(iter(own.values))
        begins = first.next
        wait_for(under_way, copies, begins, first)
        if following is None:
            break
        made = [copies[node] for node in under_way]
        end = place[next(iter(following.values))]
        moved = [node for node in own.values if place[node] < end]
        for node in moved:
            # The first is copied when those of the block before have been: what they held is free while this block is computed.
            where, behind = (begins, made) if node is first else (node.next, [])
            copies[node] = insert_call(where, cp.to_host.default, node, behind)
        # What is there at the end of a block has the time of the next one.
        under_way = [*late, *(node for node in moved if node not in own.late)]
        late = [node for node in moved if node in own.late]
    computed = [node for node in output.all_input_nodes if is_tensor(node) and node.op == "call_function"]
    wait_for(late, copies, output, max(computed, key=place.__getitem__, default=None))
    output.args = (tuple(copies.get(node, node) for node in output.args[0]),)
    return copies


def wait_for(
    nodes: Sequence[fx.Node], copies: Mapping[fx.Node, fx.Node], where: fx.Node, behind: fx.Node | None
) -> None:
    """Wait for the copies of nodes when what is `behind` them has been computed."""
    for node in nodes:
        insert_call(where, cp.wait_copy.default, copies[node], node, [] if behind is None else [behind])


def bring_back(backward: fx.GraphModule, kept: Sequence[_Kept], copies: Mapping[fx.Node, fx.Node]) -> None:
    """Copy values back to where they were, while the block is computed that comes before theirs in backward."""
    nodes = list(backward.graph.nodes)
    starts, behind = nodes[len(placeholders(backward))], list[fx.Node]()
    waits: list[tuple[fx.Node, list[fx.Node], dict[fx.Node, fx.Node]]] = []
    for own in sorted(kept, key=lambda each: each.first):
        moved = {copies[node]: given for node, given in own.values.items() if node in copies}
        arriving = {}
        for copy, given in moved.items():
            host = rename_input(given, copy)
            arriving[host] = insert_call(starts, cp.from_host.default, host, value_of(given).device, behind)
            given.replace_all_uses_with(arriving[host])
            backward.graph.erase_node(given)
        starts, behind = nodes[own.first], own.behind
        waits.append((starts, behind, arriving))
    ahead: list[fx.Node] = []
    for needed, behind, arriving in reversed(waits):
        for host, value in arriving.items():
            # Nothing reads the value before the next ones have begun to arrive.
            insert_call(needed, cp.wait_copy.default, value, host, [*behind, *ahead])
        ahead = list(arriving.values())


def rename_input(given: fx.Node, copy: fx.Node) -> fx.Node:
    """Insert an input of backward in the place of another, that takes what forward returns as `copy`."""
    with given.graph.inserting_before(given):
        host = given.graph.placeholder(copy.name)
    host.meta.update(copy.meta)
    return host
