"""Backward: the graph of backward on a rank, divided from forward as compilers do, as code under the user's lines."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import fx

from cpcompile.capture.lowering import placeholders
from cpcompile.inspect.graph_listing import argument, listing, value_type

INPUT = re.compile(r"primals_(\d+)")  # as torch calls input number n of the graph, counted from 1
READ = "what forward keeps, and the gradients of what it returns (tangents)"


def backward_listing(backward: fx.GraphModule, inputs: Sequence[str]) -> str:
    """Return a graph of backward as code: what it reads, its operators with the shapes that a rank has, and the gradients.

    Args:
        backward: the half of a graph that `divided` returns; nodes that are inputs of forward get their names.
        inputs: the names of all inputs of forward.
    """
    for node in placeholders(backward):
        known = INPUT.fullmatch(node.name)
        if known is not None:
            node.name = inputs[int(known[1]) - 1]
    read = [f"{argument(node)}: {value_type(node) or 'a number'}" for node in placeholders(backward)]
    body = listing(backward).rpartition("\nreturn ")[0].strip("\n")
    (output,) = backward.graph.find_nodes(op="output")
    made = zip(inputs, output.args[0], strict=False)
    grads = [f"{name}.grad = {argument(grad)}" for name, grad in made if isinstance(grad, fx.Node)]
    return "\n".join([f"# {READ}", *read, "", body, "", *grads])
