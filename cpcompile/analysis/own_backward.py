"""Own backward: the nodes of a backward of the model's own, out of the graph in which passes placed them.

before  g = cp.incoming_gradient(y); dx = aten.mul(g, slope); y_1 = cp.own_gradient([y], [x], [g], [dx])
after   y_1 = cp.own_backward([y], [x], [slope], [], body)      # body: lambda g, slope: [aten.mul(g, slope)]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cpcompile._torch.own_backward import MARK
from cpcompile.ir.operator_call import Call, is_tensor
from cpcompile.runtime.own_backward import add_body

aten, cp = torch.ops.aten, torch.ops.cpcompile


def enclose_backwards(gm: fx.GraphModule, scale: float = 1.0) -> int:
    """Return how many backwards of the model's own became bodies, so that the graph computes gradients.

    Gradients that come in are `scale` times those of one device, and so are those that go out.
    """
    nodes = gm.graph.find_nodes(op="call_function", target=cp.own_gradient.default)
    for node in nodes:
        enclose(node, scale)
    if nodes:
        for node in gm.graph.nodes:  # equal layers have equal marks
            node.meta["custom"] = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != MARK}
        gm.recompile()
    return len(nodes)


def enclose(node: fx.Node, scale: float) -> None:
    """Let a call compute its gradients by a body, and take what only that computes out of the graph."""
    call = Call.of(node)
    incoming, gradients = call["incoming"], call["gradients"]
    inside = members_of(node)
    read = dict.fromkeys(x for member in inside for x in member.all_input_nodes) | dict.fromkeys(gradients)
    given = [x for x in read if x not in inside and x not in incoming]
    saved, sizes = [x for x in given if is_tensor(x)], [x for x in given if not is_tensor(x)]
    graph = fx.Graph()
    known = {x: graph.placeholder(f"operand_{i}") for i, x in enumerate([*incoming, *saved, *sizes])}
    if scale != 1:
        known |= {x: graph.call_function(aten.mul.Scalar, (known[x], 1 / scale)) for x in incoming}
    for i, member in enumerate(inside):
        args, kwargs = fx.map_arg((member.args, member.kwargs), known.__getitem__)
        # Names are alike in equal layers, whose bodies are the same.
        known[member] = graph.create_node(member.op, member.target, args, kwargs, f"value_{i}")
        known[member].meta = dict(member.meta)
    found = [known[x] for x in gradients]
    graph.output(found if scale == 1 else [graph.call_function(aten.mul.Scalar, (x, scale)) for x in found])
    node.target = cp.own_backward.default
    node.args = (call["results"], call["operands"], saved, sizes, add_body(fx.GraphModule(torch.nn.Module(), graph)))
    for member in (*reversed(inside), *incoming):
        node.graph.erase_node(member)


def members_of(node: fx.Node) -> list[fx.Node]:
    """Return what the backward of a call computes, in order: what reads incoming gradients, and what only that needs."""
    call, number = Call.of(node), mark_of(node)
    incoming, kept = call["incoming"], {*call["results"], *call["operands"]}
    before = nodes_between(min(incoming), node)
    reached: set[fx.Node] = set(incoming)
    for other in before:
        if not reached.isdisjoint(other.all_input_nodes):
            reached.add(other)
    inside: set[fx.Node] = set()
    for other in reversed(before):
        is_own = other in reached or (mark_of(other) == number and other.op == "call_function" and other not in kept)
        if is_own and all(user is node or user in inside for user in other.users):
            inside.add(other)
    inside -= set(incoming)
    assert reached <= inside | set(incoming), "a gradient is read outside of the backward"
    return [other for other in before if other in inside]


def nodes_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return the nodes from one to another, without the latter."""
    found, node = [], first
    while node is not last:
        found.append(node)
        node = node.next
    return found


def mark_of(node: fx.Node) -> Any:
    """Return the number of the call whose backward a node is written for, if there is one."""
    return (node.meta.get("custom") or {}).get(MARK)
