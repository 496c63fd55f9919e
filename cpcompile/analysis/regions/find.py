"""Find: the nodes of a graph that one call of a token-local module or function made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.analysis.regions.declare import declared_region
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import is_tensor, value_of


@dataclass(frozen=True, slots=True)
class Region:
    """The nodes of one call of a token-local module, in their order. No node in between depends on them."""

    name: str
    nodes: tuple[fx.Node, ...]

    @property
    def inputs(self) -> list[fx.Node]:
        """The nodes outside that the region reads, each once."""
        inside = set(self.nodes)
        return list(dict.fromkeys(o for node in self.nodes for o in node.all_input_nodes if o not in inside))

    @property
    def results(self) -> list[fx.Node]:
        """The nodes that are read outside."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]


def find_regions(gm: fx.GraphModule, patterns: Sequence[str]) -> list[Region]:
    """Return the regions of the modules and functions that are declared, `patterns` included.

    Sizes that are computed from other sizes are left out: they are those of the whole, and a region is given its own.
    """
    runs: list[tuple[str, str, list[fx.Node]]] = []
    members: set[fx.Node] = set()
    current: str | None = None
    for node in gm.graph.nodes:
        if node.op != "call_function" or value_of(node) is None or is_size_of_whole(node, members):
            continue
        key, path = declared_region(node, patterns) or (None, "")
        if key is not None and key != current:
            runs.append((key, path, []))
        current = key
        if key is not None:
            runs[-1][2].append(node)
            members.add(node)
    counts: dict[str, int] = {}
    regions = []
    for _, path, nodes in runs:
        counts[path] = counts.get(path, 0) + 1
        if any(is_tensor(node) for node in nodes):
            regions.append(Region(path if counts[path] == 1 else f"{path} (call {counts[path]})", tuple(nodes)))
    return regions


def is_size_of_whole(node: fx.Node, members: set[fx.Node]) -> bool:
    """Tell whether a node computes a number without reading what a region computes."""
    is_number = isinstance(value_of(node), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
    return is_number and members.isdisjoint(node.all_input_nodes)


def regions_of(gm: fx.GraphModule) -> list[Region]:
    """Return the regions that a pass recorded in the graph, in order."""
    found: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if annotation(node).region:
            found.setdefault(annotation(node).region, []).append(node)
    return [Region(name, tuple(nodes)) for name, nodes in found.items()]
