"""Parameter writes: what a model writes to a parameter is a result of the graph, and is copied there when that has run.

before  y = aten.linear(x, weight); z = aten.clamp(aten.detach(weight), -1, 1); aten.copy_(weight, z); return (y,)
after   kept = cp.kept_copy(aten.detach(weight)); y = ...; z = ...; return (y, z)

The parameter has passed what sums its gradients when the graph gets it, and autograd lets no such tensor be written. Backward
reads the copy: compilers compute small values again, and by then the parameter has been overwritten.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.capture.lowering import placeholders
from cpcompile.ir.annotation import annotation
from cpcompile.ir.insertion import insert_call

aten, cp = torch.ops.aten, torch.ops.cpcompile


def parameter_writes(graph: fx.GraphModule) -> dict[int, fx.Node]:
    """Return the copies to inputs that take a gradient and are written without one, by the place of the input."""
    places = {node: i for i, node in enumerate(placeholders(graph))}
    found, is_recording = {}, True
    for node in graph.graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            is_recording = bool(node.args[0])
        elif node.target is aten.copy_.default and not is_recording and annotation(node.args[0]).takes_gradient:
            found[places[node.args[0]]] = node
    return found


def return_parameter_writes(graph: fx.GraphModule) -> int:
    """Have the graph return what it would write to parameters, behind its outputs; returns how many there are."""
    (output,) = graph.graph.find_nodes(op="output")
    writes = parameter_writes(graph)
    for write in writes.values():
        parameter, value = write.args
        assert isinstance(parameter, fx.Node)
        written = insert_call(output, aten.detach.default, value)
        output.args = ((*output.args[0], written),)
        graph.graph.erase_node(write)
        keep_parameter(parameter)
    return len(writes)


def keep_parameter(parameter: fx.Node) -> None:
    """Have what reads a parameter read a copy, with the gradient of the parameter."""
    readers = list(parameter.users)
    if not readers:
        return
    # The first reader may be where gradients are off.
    first = next(node for node in parameter.graph.nodes if node.op != "placeholder")
    bare = insert_call(first, aten.detach.default, parameter)
    kept = keep_copy(first, bare)
    zero = insert_call(first, aten.sub.Tensor, parameter, bare)
    parameter.replace_all_uses_with(
        insert_call(first, aten.add.Tensor, kept, zero), delete_user_cb=set(readers).__contains__
    )


def keep_copy(before: fx.Node, x: fx.Node) -> fx.Node:
    """Insert a copy that is kept for backward."""
    copied = insert_call(before, cp.kept_copy.default, x)
    copied.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    copied.meta.pop("ac_graph_id", None)
    return copied
