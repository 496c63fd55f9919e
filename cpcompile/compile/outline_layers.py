"""Outline layers: equal layers become calls of one subgraph, which Inductor lowers, schedules and compiles once.

before  a1 = mm(x, w1); h1 = relu(a1); a2 = mm(h1, w2); h2 = relu(a2)
after   h1 = invoke_subgraph(layer, x, w1); h2 = invoke_subgraph(layer, h1, w2)

The graphs are those of forward and of backward, behind autograd: what is kept for backward and in which order things run is
decided for the whole model. Transfers of parameters stay outside, so that they can begin while the layer before is computed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from cpcompile.compile.equal_layers import Layer, externals_of, find_equal_layers, read_outside
from cpcompile.ir.operator_call import is_view, value_of

invoke_subgraph = torch.ops.higher_order.invoke_subgraph


def outline_layers(gm: fx.GraphModule) -> int:
    """Return how many layers became calls. The graph holds ATen operators on fake values."""
    count = 0
    for number, layers in enumerate(find_equal_layers(gm.graph)):
        outline(gm, layers, f"cpcompile_layer_{number}")
        count += len(layers)
    if count:
        sort_again(gm.graph)
        gm.graph.lint()
        gm.recompile()
    return count


def outline(gm: fx.GraphModule, layers: Sequence[Layer], name: str) -> None:
    """Make each of several equal layers a call of a new subgraph."""
    for layer in layers:
        keep_views_outside(layer)
    own = [set(layer) for layer in layers]
    places = range(len(layers[0]))
    read = [i for i in places if any(read_outside(layer[i], of) for layer, of in zip(layers, own, strict=True))]
    symbols = symbols_of(gm.graph, layers[0])
    setattr(gm, name, subgraph_of(layers[0], [*symbols, *externals_of(layers[0])], read))
    with gm.graph.inserting_before(next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))):
        body = gm.graph.get_attr(name)
    for layer in layers:
        call_in_place_of(layer, [body, name, *symbols, *externals_of(layer)], read)


def keep_views_outside(layer: Layer) -> None:
    """Have other nodes that read a view made in a layer read one made outside of it: what calls return shares no memory."""
    own = set(layer)
    for node in reversed(layer):
        others = [user for user in node.users if user not in own]
        if others and is_view(node.target):
            with node.graph.inserting_after(node):
                outside = node.graph.node_copy(node)
            for user in others:
                user.replace_input_with(node, outside)


def symbols_of(graph: fx.Graph, layer: Layer) -> list[fx.Node]:
    """Return nodes that hold the symbols in the sizes of a layer, which its code names."""
    symbols = set().union(*(free_symbols(value_of(node)) for node in (*layer, *externals_of(layer))))
    return [holder_of(graph, symbol) for symbol in sorted(symbols, key=str)]


def holder_of(graph: fx.Graph, symbol: Any) -> fx.Node:
    """Return a node whose value is a symbol: an input, or the size of one."""
    inputs = graph.find_nodes(op="placeholder")
    for node in inputs:
        if isinstance(value_of(node), torch.SymInt) and value_of(node).node.expr == symbol:
            return node
    for node in inputs:
        sizes = value_of(node).shape if isinstance(value_of(node), torch.Tensor) else ()
        for dim, size in enumerate(sizes):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                with graph.inserting_before(node):
                    found = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
                found.meta["val"] = size
                return found
    raise AssertionError(f"no input of the graph has the size {symbol}")


def subgraph_of(layer: Layer, operands: Iterable[fx.Node], read: Sequence[int]) -> fx.GraphModule:
    """Return a graph of a layer that takes `operands` and returns the results at the places `read`."""
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for i, operand in enumerate(operands):
        known[operand] = graph.placeholder(f"operand_{i}")
        known[operand].meta = {"val": value_of(operand)}
    for node in layer:
        known[node] = graph.node_copy(node, known.__getitem__)
    output = graph.output(tuple(known[layer[i]] for i in read))
    output.meta["user_visible_output_idxs"] = list(range(len(read)))  # their strides are what callers were told
    return fx.GraphModule(torch.nn.Module(), graph)


def call_in_place_of(layer: Layer, arguments: Sequence[object], read: Sequence[int]) -> None:
    """Put a call in the place of a layer; `read` are the places of what it returns."""
    graph, last = layer[-1].graph, layer[-1]
    with graph.inserting_after(last):
        call = graph.call_function(invoke_subgraph, tuple(arguments))
    call.meta = {**last.meta, "val": tuple(value_of(layer[i]) for i in read)}
    own = set(layer)
    for number, i in enumerate(read):
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, number))
        result.meta = dict(layer[i].meta)
        layer[i].replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
        if not result.users:
            graph.erase_node(result)
    for node in reversed(layer):
        graph.erase_node(node)


def sort_again(graph: fx.Graph) -> None:
    """Put each node behind what it reads, and leave the order as it is otherwise."""
    order: dict[fx.Node, None] = {}
    for node in graph.nodes:
        stack = [node]
        while stack:
            missing = [x for x in stack[-1].all_input_nodes if x not in order]
            if missing:
                stack += reversed(missing)
            else:
                order.setdefault(stack.pop())
    nodes = list(order)
    for before, node in itertools.pairwise(nodes):
        before.append(node)
