"""Gradient flow: which values of a graph gradients reach."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import value_of

aten = torch.ops.aten


def needs_no_gradient(node: fx.Node) -> bool:
    """Tell whether a value is computed without anything that a gradient may reach."""
    seen, stack = {node}, [node]
    while stack:
        x = stack.pop()
        if stops_gradients(x):
            continue
        if annotation(x).takes_gradient:
            return False
        fresh = [y for y in x.all_input_nodes if y not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def gradient_flow(graph: fx.Graph) -> set[fx.Node]:
    """Return all nodes whose results gradients may reach."""
    off, found = unrecorded(graph), set[fx.Node]()
    for node in graph.nodes:
        is_reached = annotation(node).takes_gradient or not found.isdisjoint(node.all_input_nodes)
        if is_reached and node not in off and not stops_gradients(node):
            found.add(node)
    return found


def stops_gradients(node: fx.Node) -> bool:
    """Tell whether no gradient passes a node, whatever it reads."""
    value = value_of(node)
    is_count = isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
    return is_count or node.target is aten.detach.default


def unrecorded(graph: fx.Graph) -> set[fx.Node]:
    """Return what a graph computes where gradients are off (`torch.no_grad`)."""
    found = set[fx.Node]()
    switches = set(graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled, sort=False))
    for off in (switch for switch in switches if not switch.args[0]):
        node = off.next
        while node.op != "root" and node not in switches:
            found.add(node)
            node = node.next
    return found
