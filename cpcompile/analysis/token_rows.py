"""Token rows: the operators that compute each token's row of a value from that token's rows alone, found from one value on.

A value holds rows if its leading dims are those of the tokens, in one order, and `inner` dims behind them are what each token
has. Here all of them are written again with one dim in the place of the leading ones, so that they run for some tokens.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.gradient_flow import unrecorded
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_call, insert_copy, keep_source
from cpcompile.ir.operator_call import Call, is_tensor, value_of

aten = torch.ops.aten

_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.self,
}
_VIEWS = {aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints}
# Operators on one of the inner dims, their argument `dim`.
_ALONG = {
    aten.log_softmax.int,
    aten.softmax.int,
    aten._log_softmax.default,
    aten._softmax.default,
    aten.slice.Tensor,
    aten.gather.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.logsumexp.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.amax.default,
    aten.argmax.default,
}
# Products of rows with a weight, by the name of the rows.
PRODUCTS = {
    aten.linear.default: "input",
    aten.addmm.default: "mat1",
    aten.mm.default: "self",
    aten.matmul.default: "self",
}
_PIECES = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_chunk.default}
_LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}
_NONE, _SUM = 0, 2  # at::Reduction


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


def wide_region_of(source: fx.Node) -> RowRegion | None:
    """Return what products of the rows of `source` make wider than it, with all that reads that; None if some is not by rows."""
    width = value_of(source).shape[-1]
    starts = {x for x in source.users if x.target in PRODUCTS and Call.of(x)[PRODUCTS[x.target]] is source}
    wide = {x for x in starts if is_wider(value_of(x).shape[-1], width)}
    if not wide:
        return None
    writer = _Writer(source, lambda node: True)

    def is_wide(node: fx.Node) -> bool:
        writer.add(node)
        return bool(writer.region.size(node) > width)

    try:
        follow(wide, is_wide)
    except NotByRowsError:
        return None
    return writer.region


def follow(starts: Iterable[fx.Node], leads_on: Callable[[fx.Node], bool]) -> None:
    """Visit nodes in the order of the graph: `starts`, and what reads a visited one that `leads_on`."""
    waiting, seen = list(starts), set[fx.Node]()
    heapq.heapify(waiting)
    while waiting:
        node = heapq.heappop(waiting)
        if node in seen:
            continue
        seen.add(node)
        if leads_on(node):
            for user in node.users:
                heapq.heappush(waiting, user)


def is_wider(size: object, width: object) -> bool:
    """Tell whether a size is known to be larger than another."""
    return isinstance(size, int) and isinstance(width, int) and size > width


def region_of(source: fx.Node, is_constant: Callable[[fx.Node], bool]) -> RowRegion:
    """Return all that is computed of the rows of `source`, `[..., inner]`, up to sums over the tokens.

    Args:
        source: its last dim is the inner one.
        is_constant: whether a value from elsewhere needs no gradient; operators on others are left out.
    """
    return _Writer(source, is_constant).written()


class _Writer:
    """Writes the graph for some tokens, operator by operator."""

    def __init__(self, source: fx.Node, is_constant: Callable[[fx.Node], bool]) -> None:
        shape = tuple(value_of(source).shape)
        self.region = RowRegion(source, {source: Rows(shape[:-1], static(shape[-1:]))})
        self.is_constant = is_constant
        self.rows, self.graph, self.made = self.region.rows, self.region.graph, self.region.made
        self.made[source] = self.graph.placeholder("value")
        self.region.unrecorded = unrecorded(source.graph)
        if source in self.region.unrecorded:
            raise NotByRowsError

    def written(self) -> RowRegion:
        follow(self.region.source.users, self._has_rows)
        return self.region

    def _has_rows(self, node: fx.Node) -> bool:
        """Write an operator, if it can be, and tell whether it computes rows."""
        if node.op == "call_function" and node.target not in PRODUCTS:
            with contextlib.suppress(NotByRowsError):
                self.add(node)
        return self.rows.get(node) is not None

    def add(self, node: fx.Node) -> None:
        """Write an operator.

        Raises:
            NotByRowsError: it does not compute rows from rows, or where gradients are off.
        """
        if node in self.region.unrecorded:
            raise NotByRowsError
        if node.target is operator.getitem and node.args[0] in self.rows:
            parent, index = node.args
            of = self._of(parent)  # type: ignore[arg-type]
            self.made[node] = self.graph.call_function(operator.getitem, (self.made[parent], index))  # type: ignore[index]
            self.rows[node] = of.of_inner(value_of(node).shape[len(of.lead) :])
        elif isinstance(node.target, torch._ops.OpOverload):
            self.rows[node] = self._write(Call.of(node))
        else:
            raise NotByRowsError

    def _write(self, call: Call) -> Rows | None:
        target = call.target
        if target in PRODUCTS:
            return self._product(call)
        if target in _PIECES:
            return self._pieces(call)
        if not is_tensor(call.node):
            raise NotByRowsError
        if target in _VIEWS:
            return self._view(call)
        if target in _ALONG:
            return self._along(call)
        if target in _LOSSES:
            return self._loss(call)
        if target is aten.sum.default:
            self._emit(call, {"self": self._inside(call["self"])})
            return None
        is_pointwise = torch.Tag.pointwise in target.tags and torch.Tag.nondeterministic_seeded not in target.tags
        if (is_pointwise or target in _SAME) and not target._schema.is_mutable:
            return self._pointwise(call)
        raise NotByRowsError

    def _emit(self, call: Call, changes: dict[str, Any]) -> None:
        args, kwargs = call.rebound(changes)
        self.made[call.node] = self.graph.call_function(call.target, args, kwargs)

    def _inside(self, node: Any) -> fx.Node:
        """Return what stands for the rows of a node."""
        if not isinstance(node, fx.Node) or self.rows.get(node) is None:
            raise NotByRowsError
        return self.made[node]

    def _of(self, node: fx.Node) -> Rows:
        rows = self.rows.get(node)
        if rows is None:
            raise NotByRowsError
        return rows

    def _given(self, node: fx.Node, num_lead: int = 0) -> fx.Node:
        """Return what stands for a value from elsewhere, the first dims of which may be those of the tokens."""
        if (
            node in self.rows
            or not self.is_constant(node)
            or self.region.num_lead.setdefault(node, num_lead) != num_lead
        ):
            raise NotByRowsError
        given = self.region.given_rows if num_lead else self.region.given_others
        if node not in given:
            given[node] = self.graph.placeholder("given")
        return given[node]

    def _operand(self, node: fx.Node, lead: tuple[Any, ...], num_inner: int) -> tuple[fx.Node, int]:
        """Return what stands for an operand that is broadcast to rows, and how many inner dims it has."""
        if node in self.rows:
            of = self._of(node)
            if not same(of.lead, lead):
                raise NotByRowsError
            return self.made[node], len(of.inner)
        shape = tuple(value_of(node).shape)
        if len(shape) <= num_inner:
            return self._given(node), len(shape)
        before, inner = shape[: len(shape) - num_inner], static(shape[len(shape) - num_inner :])
        if same(before, lead):
            return self._given(node, len(lead)), num_inner
        if all(size == 1 for size in static(before)):
            made = self._given(node)
            return self.graph.call_function(aten.reshape.default, (made, list(inner))), num_inner
        raise NotByRowsError

    def _pointwise(self, call: Call) -> Rows:
        known = [self._of(x) for _, x in call.operands() if x in self.rows]
        shape = tuple(call.result.shape)
        lead = known[0].lead
        num_inner = len(shape) - len(lead)
        if num_inner < 0 or not same(shape[: len(lead)], lead):
            raise NotByRowsError
        changes = {}
        for name, node in call.operands():
            made, has = self._operand(node, lead, num_inner)
            if node in self.rows and has != num_inner:
                raise NotByRowsError  # its tokens would meet another dim
            changes[name] = made
        self._emit(call, changes)
        return known[0].of_inner(shape[len(lead) :])

    def _view(self, call: Call) -> Rows:
        of, shape = self._of(call["self"]), tuple(call.result.shape)
        size, num_inner = math.prod(of.inner), 0
        while of.inner and math.prod(static(shape[len(shape) - num_inner :])) != size:
            num_inner += 1
            if num_inner > len(shape):
                raise NotByRowsError
        inner = static(shape[len(shape) - num_inner :])
        made = self._inside(call["self"])
        self.made[call.node] = self.graph.call_function(aten.reshape.default, (made, [-1, *inner]))
        num_lead = len(shape) - num_inner
        if num_lead == 1:
            return Rows(shape[:1], inner, (-1,))
        if "size" not in call and "shape" not in call:
            raise NotByRowsError
        return Rows(shape[:num_lead], inner, tuple(call["size" if "size" in call else "shape"][:num_lead]))

    def _along(self, call: Call) -> Rows:
        of, result = self._of(call["self"]), tuple(call.result.shape)
        if call.target is aten.slice.Tensor and takes_all(
            call
        ):  # of the tokens of a rank: the lengths are those of the whole
            self.made[call.node] = self._inside(call["self"])
            return replace(of, lead=result[: len(of.lead)])
        rank = len(of.lead) + len(of.inner) + (call.target is aten.unsqueeze.default)
        dims = call["dim"] if isinstance(call["dim"], list | tuple) else [call["dim"]]
        if not dims or None in dims or min(int(d) % rank for d in dims) < len(of.lead):
            raise NotByRowsError
        moved = [int(d) % rank - len(of.lead) + 1 for d in dims]
        changes: dict[str, Any] = {"self": self._inside(call["self"])}
        changes["dim"] = moved if isinstance(call["dim"], list | tuple) else moved[0]
        for name, node in call.operands():
            if name != "self":  # the index of a gather
                changes[name], has = self._operand(node, of.lead, len(of.inner))
                if has != len(of.inner):
                    raise NotByRowsError
        self._emit(call, changes)
        return of.of_inner(result[len(of.lead) :])

    def _product(self, call: Call) -> Rows:
        """Write a product of rows with a weight."""
        name = PRODUCTS[call.target]
        of = self._of(call[name])
        others = {key: x for key, x in call.operands() if key != name}
        if len(of.inner) != 1 or any(x in self.rows or value_of(x).dim() > 2 for x in others.values()):
            raise NotByRowsError
        self._emit(call, {name: self.made[call[name]], **{key: self._given(x) for key, x in others.items()}})
        return of.of_inner(tuple(call.result.shape)[len(of.lead) :])

    def _pieces(self, call: Call) -> Rows:
        of = self._of(call["self"])
        dim = int(call["dim"]) % (len(of.lead) + len(of.inner))
        if dim < len(of.lead):
            raise NotByRowsError
        self._emit(call, {"self": self.made[call["self"]], "dim": dim - len(of.lead) + 1})
        return of

    def _loss(self, call: Call) -> Rows | None:
        of = self._of(call["self"])
        if len(of.lead) != 1 or len(of.inner) != 1 or call["reduction"] not in (_NONE, _SUM):
            raise NotByRowsError
        rank = len(call.shape("target")) - 1
        target, _ = self._operand(call["target"], of.lead, rank)
        changes = {"self": self._inside(call["self"]), "target": target}
        if call["weight"] is not None:
            changes["weight"] = self._given(call["weight"])
        self._emit(call, changes)
        return of.of_inner(()) if call["reduction"] == _NONE else None


def takes_all(call: Call) -> bool:
    """Tell whether a slice is the whole operand."""
    return call["start"] in (None, 0) and call["end"] in (None, sys.maxsize) and call["step"] == 1


def static(sizes: Sequence[Any]) -> tuple[int, ...]:
    """Return sizes that are numbers.

    Raises:
        NotByRowsError: one is not.
    """
    if not all(isinstance(size, int) for size in sizes):
        raise NotByRowsError
    return tuple(sizes)


def same(sizes: Sequence[Any], others: Sequence[Any]) -> bool:
    """Tell whether sizes are known to be equal."""
    return len(sizes) == len(others) and all(map(_is_same, sizes, others))


def _is_same(size: Any, other: Any) -> bool:
    if isinstance(size, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(size.node.expr == other.node.expr)
    return isinstance(size, int) and isinstance(other, int) and size == other
