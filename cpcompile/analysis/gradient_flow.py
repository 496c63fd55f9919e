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
        value = value_of(x)
        if x.target is aten.detach.default or (isinstance(value, torch.Tensor) and not value.is_floating_point()):
            continue
        if annotation(x).takes_gradient:
            return False
        fresh = [y for y in x.all_input_nodes if y not in seen]
        seen.update(fresh)
        stack += fresh
    return True


def unrecorded(graph: fx.Graph) -> set[fx.Node]:
    """Return what a graph computes where gradients are off (`torch.no_grad`)."""
    found, is_recording = set[fx.Node](), True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            is_recording = bool(node.args[0])
        elif not is_recording:
            found.add(node)
    return found
