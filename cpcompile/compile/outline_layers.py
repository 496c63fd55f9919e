"""Outline layers: equal layers become calls of one subgraph, which Inductor lowers, schedules and compiles once.

before  a1 = mm(x, w1); h1 = relu(a1); a2 = mm(h1, w2); h2 = relu(a2)
after   h1 = invoke_subgraph(layer, x, w1); h2 = invoke_subgraph(layer, h1, w2)

The graph is above autograd: torch makes forward and backward of the subgraph once, and decides once what is kept.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols
from torch.utils.checkpoint import CheckpointPolicy

from cpcompile.compile.attention_layers import share_layer
from cpcompile.compile.equal_layers import Layer, externals_of, find_equal_layers, is_made_outside, read_outside
from cpcompile.compile.layer_names import LayerNames
from cpcompile.compile.result_memory import body_of, invoke_subgraph
from cpcompile.ir.insertion import insert_call, keep_source
from cpcompile.ir.operator_call import expression, is_view, value_of, values_of

aten = torch.ops.aten


def outline_layers(gm: fx.GraphModule) -> int:
    """Return how many layers became calls. The graph holds ATen operators above autograd."""
    count, names = 0, LayerNames(gm)
    for number, (layers, reached) in enumerate(find_equal_layers(gm.graph)):
        outline(gm, layers, f"cpcompile_layer_{number}", reached, names)
        sort_again(gm.graph)
        count += len(layers)
    if count:
        gm.graph.eliminate_dead_code()
        gm.graph.lint()
        gm.recompile()
    return count


def outline(
    gm: fx.GraphModule, layers: Sequence[Layer], name: str, reached: AbstractSet[fx.Node], names: LayerNames
) -> None:
    """Make each of several equal layers a call of a new subgraph; `reached` is what gradients may reach."""
    for layer in layers:
        make_outside(layer)
    own = [set(layer) for layer in layers]
    places = range(len(layers[0]))
    read = [i for i in places if any(read_outside(layer[i], of) for layer, of in zip(layers, own, strict=True))]
    first = next(node for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr"))
    sizes = sizes_of(layers[0], first)
    setattr(gm, name, subgraph_of(layers, [*externals_of(layers[0]), *sizes], read))
    with gm.graph.inserting_before(first):
        body = gm.graph.get_attr(name)
    for layer in layers:
        arguments = [body, name, *externals_of(layer), *sizes]
        call_in_place_of(layer, arguments, read, reached, names.of_call(layer))


def sizes_of(layer: Layer, first: fx.Node) -> list[fx.Node]:
    """Return nodes, of inputs or inserted before `first`, for the sizes that those in a layer depend on and it does not read.

    Inductor knows a size in a function only by an operand of that very size. Of its tokens a rank has `(length + 1) // 2`.
    """
    read = externals_of(layer)
    given = [value for x in read if isinstance(value := value_of(x), torch.SymInt)]
    missing = free_symbols([values_of(x) for x in (*read, *layer)]) - set(map(expression, given))
    found = []
    for node in first.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else [value]):
            if isinstance(size, torch.SymInt) and expression(size) in missing:
                missing.remove(expression(size))
                found.append(insert_call(first, aten.sym_size.int, node, dim) if size is not value else node)
    return found


def make_outside(layer: Layer) -> None:
    """Have other nodes that read a view or a size made in a layer read one made outside of it."""
    own = set(layer)
    for node in reversed(layer):
        others = [user for user in node.users if user not in own]
        if others and is_made_outside(node):
            with node.graph.inserting_after(node):
                outside = node.graph.node_copy(node)
            for user in others:
                user.replace_input_with(node, outside)


def subgraph_of(layers: Sequence[Layer], operands: Sequence[fx.Node], read: Sequence[int]) -> fx.GraphModule:
    """Return a graph of equal layers: the first takes `operands` and returns its results at the places `read`."""
    graph = fx.Graph()
    known = {x: graph.placeholder(f"operand_{i}") for i, x in enumerate(operands)}
    for node, *others in zip(*layers, strict=True):
        known[node] = graph.node_copy(node, known.__getitem__)
        known[node].meta.pop("val", None)  # it is of the whole model, and torch finds what is this rank's
        share_layer(known[node], [node, *others])
    graph.output(tuple(known[layers[0][i]] for i in read))
    return fx.GraphModule(torch.nn.Module(), graph)


def call_in_place_of(
    layer: Layer, arguments: Sequence[Any], read: Sequence[int], reached: AbstractSet[fx.Node], name: str
) -> None:
    """Put a call in the place of a layer, whose path is `name`; `read` are the places of what it returns, `reached` what
    gradients may reach.
    """
    graph, own = layer[-1].graph, set(layer)
    with graph.inserting_after(layer[-1]):
        call = graph.call_function(invoke_subgraph, tuple(arguments))
    keep_source(call, layer[-1])
    if name:
        call.meta["nn_module_stack"] = {name: (name, "")}
    keep_results_of(call)
    for number, i in enumerate(read):
        with graph.inserting_after(call):
            result = graph.call_function(operator.getitem, (call, number))
        result.meta = dict(layer[i].meta)
        keep_results_of(result)
        if reached and layer[i] not in reached:
            # torch takes all that a call returns for computed from what it was given.
            with graph.inserting_after(result):
                result = graph.call_function(aten.detach.default, (result,))
            result.meta = dict(layer[i].meta)
        layer[i].replace_all_uses_with(result, delete_user_cb=lambda user: user not in own)
    for node in reversed(layer):
        graph.erase_node(node)


def keep_results_of(call: fx.Node) -> None:
    """Have what a call returns kept for backward: what of it is computed again is decided inside."""
    call.meta.pop("ac_graph_id", None)
    call.meta.pop("custom", None)
    call.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def pass_operands_by(graph: fx.Graph) -> None:
    """Have backward read what a call was given, or views of it, in the place of the same that the call returns.

    So parameters that FSDP shards are gathered again in backward. The graph is that of forward and backward.
    """
    for call in graph.find_nodes(op="call_function", target=invoke_subgraph):
        body = body_of(call)
        operands = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[2:], strict=True))
        (returned,) = body.graph.find_nodes(op="output")
        for result in list(call.users):
            node = returned.args[0][result.args[1]]
            if isinstance(node, fx.Node) and is_seen(node, operands):
                result.replace_all_uses_with(seen_again(node, operands, result))
                graph.erase_node(result)


def is_seen(node: fx.Node, operands: Mapping[fx.Node, Any]) -> bool:
    """Tell whether a node of a function is an operand or a view of operands."""
    return node in operands or (is_view(node.target) and all(is_seen(x, operands) for x in node.all_input_nodes))


def seen_again(node: fx.Node, operands: Mapping[fx.Node, Any], result: fx.Node) -> Any:
    """Return the same of what the call was given; views are inserted before `result`."""
    if node in operands:
        return operands[node]
    known = {x: seen_again(x, operands, result) for x in node.all_input_nodes}
    with result.graph.inserting_before(result):
        view = result.graph.node_copy(node, known.__getitem__)
    view.meta = result.meta | {"val": node.meta["val"], "recompute": CheckpointPolicy.MUST_RECOMPUTE}
    return view


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
