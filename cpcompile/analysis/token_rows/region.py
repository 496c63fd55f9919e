"""Region: what is computed of the rows of one value, as a graph of some of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_call, insert_copy, keep_source
from cpcompile.ir.operator_call import is_tensor, value_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Rows:
    """How a value holds rows.

    Attributes:
        lead: the sizes of the dims of the tokens.
        inner: of those behind them.
        written: the former as a view spells them on a rank; None for those of the source.
    """

    lead: tuple[Any, ...]
    inner: tuple[int, ...]
    written: tuple[Any, ...] | None = None

    def of_inner(self, sizes: Sequence[Any]) -> Rows:
        """Return the same rows with other dims behind; raises `NotByRowsError` if a size is no number."""
        return replace(self, inner=static(sizes))


@dataclass(slots=True)
class RowRegion:
    """What is computed of the rows of one value.

    Attributes:
        source: the value.
        rows: how it and each node hold rows; None for a sum over all tokens.
        graph: all of them for some tokens.
        made: what stands there for each.
        given_rows, given_others: what stands there for values from elsewhere, of each token and of all.
        num_lead: how many dims of the former are those of the tokens.
        unrecorded: what the whole graph computes where gradients are off; no part of a region.
    """

    source: fx.Node
    rows: dict[fx.Node, Rows | None]
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    given_rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    given_others: dict[fx.Node, fx.Node] = field(default_factory=dict)
    num_lead: dict[fx.Node, int] = field(default_factory=dict)
    unrecorded: set[fx.Node] = field(default_factory=set)

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes, in order, without the value itself."""
        return [node for node in self.rows if node is not self.source]

    def size(self, node: fx.Node) -> int:
        """Return how many values a node has of each token; 0 for a sum over all."""
        rows = self.rows[node]
        return 0 if rows is None else math.prod(rows.inner)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return what reads a node outside of the region."""
        return [user for user in node.users if user not in self.rows]

    def first_reader(self, results: Sequence[fx.Node]) -> fx.Node:
        """Return before what a node must be that results are read from, where gradients are on."""
        first = min(user for node in results for user in self.readers(node))
        while first in self.unrecorded:
            first = first.prev
        return first

    def with_gradient(self) -> set[fx.Node]:
        """Return the nodes of which a gradient reaches the value that the region is computed of."""
        found = {self.source}
        for node in self.nodes:
            is_number = is_tensor(node) and not value_of(node).is_floating_point()
            if not is_number and node.target is not aten.detach.default and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return found

    def replace(self, results: Sequence[fx.Node], call: fx.Node, first: fx.Node) -> None:
        """Let what reads results outside of the region read those of `call`, which is before `first`, the earliest reader."""
        annotate(call, placement=tuple(placement_of(node) for node in results))
        for i, node in enumerate(results):
            found = insert_call(first, operator.getitem, call, i)
            keep_source(found, node)
            rows = self.rows[node]
            if rows is not None and rows.written is not None:
                with first.graph.inserting_before(first):  # sizes are those of a rank, and values those of the whole
                    found = insert_copy(first.graph, aten.reshape.default, (found, [*rows.written, *rows.inner]), node)
            found.meta["val"] = value_of(node)
            annotate(found, placement=placement_of(node), origin=annotation(node).origin)
            for user in self.readers(node):
                user.replace_input_with(node, found)

    def read_to_write(self, results: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the sizes that are read to give results their shapes."""
        found = [rows.written or () for node in results if (rows := self.rows[node]) is not None]
        return [x for written in found for x in written if isinstance(x, fx.Node)]

    def body(self, results: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
        """Return a function of the value's rows, of given rows and of given others to `results`, and which are given."""
        needed, stack = set[fx.Node](), [self.made[node] for node in results]
        while stack:
            node = stack.pop()
            needed.add(node)
            stack += [x for x in node.all_input_nodes if x not in needed]
        rows = [x for x, made in self.given_rows.items() if made in needed]
        others = [x for x, made in self.given_others.items() if made in needed]
        inputs = [self.made[self.source], *[self.given_rows[x] for x in rows], *[self.given_others[x] for x in others]]
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"x{i}") for i, node in enumerate(inputs)}
        for node in self.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[self.made[node]] for node in results))
        return fx.GraphModule({}, graph), rows, others


class NotByRowsError(Exception):
    """An operator that does not compute rows from rows, as far as is known."""


def static(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes that are numbers.

    Raises:
        NotByRowsError: one is not.
    """
    if not all(isinstance(size, int) for size in sizes):
        raise NotByRowsError
    return tuple(sizes)
