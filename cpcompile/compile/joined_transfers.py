"""Joined transfers: the parameters of a block travel by one collective, and so do their gradients.

forward   before  a = wait(all_gather(a_rows)); y = x @ a; b = wait(all_gather(b_rows)); z = y @ b
          after   both = all_gather_coalesced([a_rows, b_rows]); a = wait(both[0]); y = x @ a; b = wait(both[1]); z = y @ b
backward  before  wait(reduce_scatter(da)); wait(reduce_scatter(db))
          after   both = reduce_scatter_coalesced([da, db]); wait(both[0]); wait(both[1])

A kernel of NCCL begins to wait for the other ranks as soon as it has multiprocessors, and keeps these from the computation beside
it. On every rank it gets them when a kernel of the computation ends, so that each of many small transfers takes as long as a
product, and one that begins beside attention as long as that: on four H200s all-gathers of 1 ms took 6 ms, and one of them 46 ms.
FSDP2 joins them too, by copies into one buffer; here NCCL's group calls need no copies.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from cpcompile.capture.lowering import placeholders

c10d = torch.ops._c10d_functional
_GATHER, _SUM = c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default
_JOINED = {
    _GATHER: c10d.all_gather_into_tensor_coalesced.default,
    _SUM: c10d.reduce_scatter_tensor_coalesced.default,
}


def join_transfers(
    forward: fx.GraphModule, backward: fx.GraphModule, _: int, *, units: Mapping[int, str], joins_sums: bool
) -> None:
    """Join the transfers of each unit in both halves of a program.

    Args:
        units: which unit the parameter belongs to that an input of the program is a shard of; '' for one that travels alone.
        joins_sums: also of gradients. What a unit's first gradient holds is then held until its last is there.
    """
    if not any(
        half.graph.find_nodes(op="call_function", target=each) for half in (forward, backward) for each in _JOINED
    ):
        return  # the halves of a layer that is called
    inputs = placeholders(forward)
    by_name = {inputs[i].name: unit for i, unit in units.items() if unit}
    for half in (forward, backward):
        for gathers in _units(_gathers(half.graph, by_name)):
            _join_gathers(gathers)
        half.graph.lint()
        half.recompile()
    if joins_sums:
        for sums in _units(_sums(backward.graph, units)):
            _join_sums(sums)
        backward.graph.lint()
        backward.recompile()


def _units(members: Iterable[tuple[str, fx.Node]]) -> list[list[fx.Node]]:
    """Return the transfers that are joined: of one unit, in one group, of one dtype."""
    found = defaultdict[tuple[object, ...], list[fx.Node]](list)
    for unit, node in members:
        found[(unit, *node.args[1:], node.meta["val"].dtype)].append(node)
    return [nodes for nodes in found.values() if len(nodes) > 1]


def _gathers(graph: fx.Graph, unit_of: Mapping[str, str]) -> list[tuple[str, fx.Node]]:
    """Return the gathers of parameters, each with its unit."""
    found = []
    for node in graph.find_nodes(op="call_function", target=_GATHER):
        sources = [each for each in _lead(node) if each.op == "placeholder"]
        if len(sources) == 1 and sources[0].name in unit_of:
            found.append((unit_of[sources[0].name], node))
    return found


def _lead(node: fx.Node) -> list[fx.Node]:
    """Return what a node is computed from, one operand at a time, from the first."""
    found: list[fx.Node] = []
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
        found.append(node)
    return found[::-1]


def _join_gathers(gathers: Sequence[fx.Node]) -> None:
    """Gather at once where the first is gathered: only casts of inputs come before."""
    first = gathers[0]
    for gather in gathers[1:]:
        for node in _lead(gather):
            if node.op != "placeholder" and first < node:
                first.prepend(node)
    _replace(first, gathers)


def _sums(graph: fx.Graph, units: Mapping[int, str]) -> list[tuple[str, fx.Node]]:
    """Return the sums of gradients of parameters, each with its unit: a half returns gradients in the order of inputs."""
    (output,) = graph.find_nodes(op="output")
    found = []
    for i, unit in units.items():
        node = output.args[0][i]
        while unit and isinstance(node, fx.Node) and node.target is not _SUM:
            node = node.all_input_nodes[0] if len(node.all_input_nodes) == 1 else None
        if unit and isinstance(node, fx.Node):
            found.append((unit, node))
    return sorted(found, key=lambda each: each[1])


def _join_sums(sums: Sequence[fx.Node]) -> None:
    """Sum at once where the last is summed; what reads the results of the others comes behind."""
    last, behind = sums[-1], set(sums[:-1])
    for node in list(last.graph.nodes):
        if sums[0] < node < last and not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    if not behind.isdisjoint(last.all_input_nodes):
        return
    place = last
    for node in sorted(behind - set(sums)):
        place.append(node)
        place = node
    _replace(last, sums)


def _replace(place: fx.Node, members: Sequence[fx.Node]) -> None:
    """Put one collective where a member is, for all of them."""
    graph = place.graph
    with graph.inserting_before(place):
        joined = graph.call_function(_JOINED[place.target], ([node.args[0] for node in members], *place.args[1:]))  # type: ignore[index]
        joined.meta = {**place.meta, "val": [node.meta["val"] for node in members]}
        for i, node in enumerate(members):
            part = graph.call_function(operator.getitem, (joined, i))
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in members:
        graph.erase_node(node)
