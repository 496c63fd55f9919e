"""Deferred outputs: logits that a model returns beside a loss in chunks leave the graph, and are made when they are read.

before  return (loss, aten.linear(hidden, weight))
after   return (loss, hidden), and a graph of its own: aten.linear(hidden, weight)

A weight that FSDP shards is returned as well, as the loss has gathered it: a rank may read logits that others do not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.ir.operator_call import is_tensor, value_of
from cpcompile.runtime.parameters.unshard import gathered_parameter

cp = torch.ops.cpcompile


@dataclass(frozen=True, slots=True)
class DeferredOutput:
    """An output that is made when it is read.

    Attributes:
        position: among the outputs of the graph, where the hidden states are now.
        graph: makes it of the hidden states, of some inputs of the graph, and of gathered parameters.
        inputs: the positions of these inputs.
        gathered: the positions of these parameters, outputs behind those of the model.
        inner: its shape behind the dims that it shares with the hidden states.
        dtype: its own.
    """

    position: int
    graph: fx.GraphModule
    inputs: tuple[int, ...]
    gathered: tuple[int, ...]
    inner: tuple[int, ...]
    dtype: torch.dtype


def defer_outputs(gm: fx.GraphModule) -> list[DeferredOutput]:
    """Take outputs that only a head computes, whose loss is computed in chunks, out of a finished graph."""
    (output,) = gm.graph.find_nodes(op="output")
    calls = gm.graph.find_nodes(op="call_function", target=cp.chunked_loss.default)
    hidden = {call.args[0] for call in calls}
    found: list[DeferredOutput] = []
    values = list(output.args[0])
    for position, node in enumerate(output.args[0]):
        deferred = _deferred(gm, position, node, hidden, output, values) if is_tensor(node) else None
        if deferred is not None:
            found.append(deferred)
    if found:
        output.args = (tuple(values),)
        gm.graph.eliminate_dead_code()
        gm.recompile()
    return found


def _deferred(
    gm: fx.GraphModule, position: int, node: fx.Node, hidden: set[fx.Node], output: fx.Node, values: list[fx.Node]
) -> DeferredOutput | None:
    """Return the output, and have the graph return `values` in its place; None for one that is not of a head alone."""
    cone = _behind(node, hidden)
    sources = cone & hidden
    behind = {x for x in cone - hidden if _behind(x, hidden) & hidden}
    if len(sources) != 1 or node in hidden or any(user not in behind | {output} for x in behind for user in x.users):
        return None
    sharded = [x for x in gm.graph.nodes if x in cone and x.target is cp.unshard_parameter.default]
    others = [x for x in cone - hidden if getattr(x.target, "namespace", "") in ("cpcompile", "_c10d_functional")]
    if set(others) != set(sharded):
        return None
    (source,) = sources
    value, num_lead = value_of(node), value_of(source).dim() - 1
    inner = value.shape[num_lead:]
    if value.dim() != num_lead + 1 or not isinstance(inner[0], int):
        return None
    inputs = gm.graph.find_nodes(op="placeholder")
    used = [i for i, x in enumerate(inputs) if x in cone]
    graph = fx.Graph()
    copies = {source: graph.placeholder("hidden")} | {inputs[i]: graph.placeholder(inputs[i].name) for i in used}
    for i in used:
        copies[inputs[i]].meta.update(inputs[i].meta)
    for x in sharded:
        shard, *sharding = x.args
        whole = graph.placeholder(f"whole_{x.name}")
        copies[x] = graph.call_function(gathered_parameter, (copies[shard], whole, *sharding))
    for x in gm.graph.nodes:
        if x in cone and x not in copies:
            copies[x] = graph.node_copy(x, copies.__getitem__)
    graph.output(copies[node])
    made = fx.GraphModule(gm, graph)
    values[position] = source
    gathered = tuple(range(len(values), len(values) + len(sharded)))
    values += [_detached(x, output) for x in sharded]
    return DeferredOutput(position, made, tuple(used), gathered, tuple(inner), value.dtype)


def _detached(node: fx.Node, output: fx.Node) -> fx.Node:
    with output.graph.inserting_before(output):
        made = output.graph.call_function(torch.ops.aten.detach.default, (node,))
    made.meta.update(node.meta)
    return made


def _behind(node: fx.Node, stops: set[fx.Node]) -> set[fx.Node]:
    """Return all that a node is computed from, itself included, not further up than `stops`."""
    seen, stack = {node}, [node]
    while stack:
        x = stack.pop()
        if x in stops:
            continue
        fresh = [y for y in x.all_input_nodes if y not in seen]
        seen.update(fresh)
        stack += fresh
    return seen
