"""The order of operations in Inductor, decided last: behind fusion and its own order for memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor.ir import MultiOutput
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
        gathers, sums = (self._transfers(nodes, operators) for operators in _operators())
        if not gathers and not sums:
            return nodes
        fixed = {i for i, node in enumerate(nodes) if contains_collective(node) or contains_wait(node)}
        fixed -= {i for transfers in (gathers, sums) for start, wait, _ in transfers for i in (start, wait)}
        return [nodes[i] for i in self.order(_needs(nodes), gathers, sums, self.limit, fixed=fixed)]

    def _transfers(self, nodes: Sequence[Any], operators: Sequence[Any]) -> list[tuple[int, int, int]]:
        """Return (start, wait, bytes) of the collectives that parameters travel by: one of several results is as many."""
        starts = {
            node.node.get_name(): i
            for i, node in enumerate(nodes)
            if any(is_collective(node.node, operator) for operator in operators)
            and self.groups & set(map(str, node.node.constant_args))
        }
        made = {name: (i, nodes[i].node.inputs[0]) for name, i in starts.items()}
        for node in nodes:
            source: Any = node.node.inputs[0] if isinstance(node.node, MultiOutput) else None
            if source is not None and source.get_name() in starts:
                start = starts[source.get_name()]
                ((_, index),) = node.node.indices
                made[node.node.get_name()] = start, nodes[start].node.inputs[index]
        found = []
        for i, node in enumerate(nodes):
            if is_wait(node.node) and node.node.inputs[0].get_name() in made:
                start, sent = made[node.node.inputs[0].get_name()]
                found.append((start, i, _num_bytes(sent, node.node.inputs[0])))
        return [each for each in found if each[2]]

    @property
    def options(self) -> dict[str, Any]:
        """The options of Inductor that run the pass."""
        return {"reorder_for_compute_comm_overlap": True, "reorder_for_compute_comm_overlap_passes": [self]}


def _operators() -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    c10d = torch.ops._c10d_functional
    gathers = c10d.all_gather_into_tensor.default, c10d.all_gather_into_tensor_coalesced.default
    return gathers, (c10d.reduce_scatter_tensor.default, c10d.reduce_scatter_tensor_coalesced.default)


def _needs(nodes: Sequence[Any]) -> list[set[int]]:
    """Return, for each node, the earlier ones that it depends on, writes to the same memory included.

    Inductor puts each collective behind the wait before it by a "fake" dependency, which says nothing of what it computes.
    """
    makers = {name: i for i, node in enumerate(nodes) for name in node.get_buffer_names()}
    read = [{d.name for d in node.unmet_dependencies if not getattr(d, "is_fake", False)} for node in nodes]
    return [{makers[name] for name in names if makers.get(name, i) < i} for i, names in enumerate(read)]


def _num_bytes(sent: Any, received: Any) -> int:
    """Return the bytes of what a collective reads or writes, whichever is more; 0 for lengths that vary."""
    layouts = [x.get_layout() for x in (sent, received)]
    try:
        return max(int(math.prod(map(int, layout.size))) * int(layout.dtype.itemsize) for layout in layouts)
    except TypeError:
        return 0
