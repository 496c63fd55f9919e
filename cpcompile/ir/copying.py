"""Copying: a second graph of a program, which is not what a compiler makes of the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx

from cpcompile.ir.plan import Lengths


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph with copies of all nodes, what is known of them, and the lengths; tensors and functions are the same."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, copies))
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    made.meta["cpcompile_lengths"] = tuple(with_copies(each, copies) for each in Lengths.all_of(gm))
    return made


def with_copies(lengths: Lengths, copies: Mapping[fx.Node, fx.Node]) -> Lengths:
    """Return the same lengths with the copies of their nodes; those that nothing reads may be gone from the graph."""
    nodes = {name: getattr(lengths, name) for name in ("total", "local", "bounds")}
    found: dict[str, Any] = {name: copies[node] for name, node in nodes.items() if node in copies}
    return replace(lengths, **found)
