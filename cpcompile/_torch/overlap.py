"""The order of operations in Inductor, decided last: behind fusion and its own order for memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.utils import contains_collective, contains_wait, is_collective, is_wait

Order = Callable[..., list[int]]


@dataclass(frozen=True)
class OverlapPass:
    """A pass of Inductor's scheduler that reorders transfers of parameters and of their gradients (torch 2.11 to 2.13).

    Attributes:
        order: the function that finds the order, such as `cpcompile.compile.overlap.overlapped`.
        limit: the bytes that it may keep in flight.
        groups: names of the process groups that parameters travel in.
    """

    order: Order
    limit: int
    groups: frozenset[str]

    def __call__(self, nodes: list[Any]) -> list[Any]:
        """Return the nodes of Inductor's scheduler in the new order."""
        gathers, sums = (self._transfers(nodes, operator) for operator in _operators())
        if not gathers and not sums:
            return nodes
        fixed = {i for i, node in enumerate(nodes) if contains_collective(node) or contains_wait(node)}
        fixed -= {i for transfers in (gathers, sums) for start, wait, _ in transfers for i in (start, wait)}
        return [nodes[i] for i in self.order(_needs(nodes), gathers, sums, self.limit, fixed=fixed)]

    def _transfers(self, nodes: Sequence[Any], operator: Any) -> list[tuple[int, int, int]]:
        """Return (start, wait, bytes) of the collectives of an operator that parameters travel by."""
        made = {node.node.get_name(): i for i, node in enumerate(nodes) if is_collective(node.node, operator)}
        starts = {name: i for name, i in made.items() if self.groups & set(map(str, nodes[i].node.constant_args))}
        waits = {node.node.inputs[0].get_name(): i for i, node in enumerate(nodes) if is_wait(node.node)}
        sizes = {name: _num_bytes(nodes[i].node) for name, i in starts.items()}
        return [(i, waits[name], sizes[name]) for name, i in starts.items() if name in waits and sizes[name]]

    @property
    def options(self) -> dict[str, Any]:
        """The options of Inductor that run the pass."""
        return {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [self]}


def _operators() -> tuple[Any, Any]:
    c10d = torch.ops._c10d_functional
    return c10d.all_gather_into_tensor.default, c10d.reduce_scatter_tensor.default


def _needs(nodes: Sequence[Any]) -> list[set[int]]:
    """Return, for each node, the earlier ones that it depends on, writes to the same memory included.

    Inductor puts each collective behind the wait before it by a "fake" dependency, which says nothing of what it computes.
    """
    makers = {name: i for i, node in enumerate(nodes) for name in node.get_buffer_names()}
    read = [{d.name for d in node.unmet_dependencies if not getattr(d, "is_fake", False)} for node in nodes]
    return [{makers[name] for name in names if makers.get(name, i) < i} for i, names in enumerate(read)]


def _num_bytes(node: Any) -> int:
    """Return the bytes of what a collective reads or writes, whichever is more; 0 for lengths that vary."""
    layouts = [node.layout, *(x.get_layout() for x in node.inputs)]
    try:
        return max(int(math.prod(map(int, layout.size))) * int(layout.dtype.itemsize) for layout in layouts)
    except TypeError:
        return 0
