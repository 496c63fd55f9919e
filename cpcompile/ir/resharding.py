"""Resharding: the nodes that bring a value from one placement to another.

before  h                                      # Sharded(1), one token to the left of what it meets
after   h_1 = cp.move_tokens(h, 1, 1, 1, -1, False, 0.0, S, "zig_zag", 2, "cp")
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.balance.layout import follows_documents, num_chunks
from cpcompile.errors import NoChunks, NoRule, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import fake_result, insert_copy, keep_source
from cpcompile.ir.operator_call import Call, is_tensor, value_of
from cpcompile.ir.placement import FULL, Full, Placement, Sharded
from cpcompile.ir.plan import Lengths, Parts, Plan

aten, cp = torch.ops.aten, torch.ops.cpcompile

UNKNOWN_OUTSIDE = "tokens outside the sequence are read, and what they hold is not known"


class Resharder:
    """Inserts collectives; the same move of a value is inserted once."""

    def __init__(self, gm: fx.GraphModule, plan: Plan) -> None:
        self.gm, self.plan = gm, plan
        self.num_shards = 0
        self._reduced: dict[fx.Node, fx.Node] = {}
        self._gathered: dict[fx.Node, fx.Node] = {}
        self._moved: dict[tuple[fx.Node, Sharded], fx.Node] = {}

    def lengths(self, at: Sharded) -> Lengths:
        """Return the lengths of the sequence that is sharded."""
        return Lengths.of(self.gm, at.sequence)

    def reduce(self, node: fx.Node) -> fx.Node:
        """Return the sum over the ranks of the partial `node`."""
        if node not in self._reduced:
            with self.gm.graph.inserting_after(node):
                arguments = (node, self.plan.world_size, self.plan.group)
                self._reduced[node] = insert_copy(self.gm.graph, cp.all_reduce.default, arguments, node, FULL)
        return self._reduced[node]

    def gather(self, node: fx.Node, reason: str) -> fx.Node:
        """Return the whole of the sharded `node`; `reason` says what needs it, for the plan."""
        if node not in self._gathered:
            at = placement_of(node)
            assert isinstance(at, Sharded)
            if at.reaches_outside and at.outside is None:
                raise NoRule(f"{UNKNOWN_OUTSIDE}.\n\n{where(node)}")
            lengths = self.lengths(at)
            if lengths.parts:
                self._gathered[node] = self._of_parts(node, at, lambda part, _: self.gather(part, reason), node.next)
                return self._gathered[node]
            with self.gm.graph.inserting_after(node):
                arguments = (node, at.dim, at.inner, lengths.total, *lengths.axis(self.plan))
                whole = insert_copy(self.gm.graph, cp.gather_tokens.default, arguments, node, Full(at))
            annotate(whole, reason=reason)
            self._gathered[node] = whole if at.covers_all else self._cut(whole, at, lengths)
        return self._gathered[node]

    def _cut(self, whole: fx.Node, at: Sharded, lengths: Lengths) -> fx.Node:
        """Return the range of a value that was gathered with all its slots; tokens outside the sequence are added."""
        value = value_of(whole)
        if at.inner != 1 or not statically_known_true(value.shape[at.dim] == at.count(lengths.value)):
            raise NoRule(f"a range of tokens inside merged dims cannot be gathered.\n\n{where(whole)}")
        annotate(whole, origin="")  # no value of the captured graph has this shape
        pads = [0, 0] * (value.dim() - at.dim - 1) + [-at.front, -at.back]
        with self.gm.graph.inserting_after(whole):
            arguments = (whole, pads, at.outside or 0.0)
            cut = insert_copy(self.gm.graph, aten.constant_pad_nd.default, arguments, whole, Full(at))
        annotate(cut, origin=annotation(whole.args[0]).origin)  # type: ignore[arg-type]
        return cut

    def fit(self, node: fx.Node) -> fx.Node:
        """Return a value whose range reaches outside the sequence, moved so that every token has a slot."""
        at = placement_of(node)
        assert isinstance(at, Sharded)
        if at.front + at.back < 0:
            raise NoRule(f"{-at.front - at.back} token(s) more than the sequence has have no slot.\n\n{where(node)}")
        front = min(max(at.front, 0), at.front + at.back)
        return self.move(node, at.with_range(front, at.front + at.back - front))

    def move(self, node: fx.Node, to: Sharded) -> fx.Node:
        """Return `node` with its tokens in the slots of another range of as many tokens."""
        at = placement_of(node)
        assert isinstance(at, Sharded) and at.front + at.back == to.front + to.back
        if at == to:
            return node
        if at.reaches_outside and at.outside is None:
            raise NoRule(f"{UNKNOWN_OUTSIDE}.\n\n{where(node)}")
        if (node, to) not in self._moved:
            fill = 0.0 if at.outside is None else at.outside
            with self.gm.graph.inserting_after(node):
                places = (at.dim, at.inner, 1, at.front - to.front, False, fill)
                lengths = self.lengths(at)
                arguments = (node, *places, lengths.total, *lengths.axis(self.plan))
                self._moved[node, to] = insert_copy(self.gm.graph, cp.move_tokens.default, arguments, node, to)
        return self._moved[node, to]

    def fill_padding(self, operand: fx.Node, at: Sharded, value: float, before: fx.Node) -> fx.Node:
        """Return `operand` with `value` in the slots that hold no token of its range."""
        lengths = self.lengths(at)
        if not lengths.has_padding(self.plan) and at.covers_all:
            return operand
        if lengths.parts:
            return self._of_parts(
                operand, at, lambda part, place: self.fill_padding(part, place, value, before), before
            )
        with self.gm.graph.inserting_before(before):
            front, back = max(at.front, 0), max(at.back, 0)
            arguments = (operand, at.dim, at.inner, value, front, back, lengths.total, *lengths.axis(self.plan))
            return insert_copy(self.gm.graph, cp.fill_padding.default, arguments, operand, at)

    def shard(self, node: fx.Node, at: Sharded) -> fx.Node:
        """Return this rank's tokens of the whole value `node`."""
        if self.lengths(at).parts:
            anchor = self.first_call() if node.op == "placeholder" else max([node, *Lengths.nodes_of(self.gm)]).next
            return self._of_parts(node, at, self.shard, anchor)
        self.num_shards += 1
        at = at.with_range(at.front, at.back)
        with self._behind(node):
            whole = node if at.covers_all else self._extend(node, at)
        with self._behind(whole):
            lengths = self.lengths(at)
            arguments = (whole, at.dim, at.inner, lengths.total, *lengths.axis(self.plan))
            return insert_copy(self.gm.graph, cp.shard_tokens.default, arguments, node, at)

    def _of_parts(
        self, node: fx.Node, at: Sharded, make: Callable[[fx.Node, Sharded], fx.Node], before: fx.Node
    ) -> fx.Node:
        """Return what `make` makes of each sequence of a joined one, joined again. It takes local parts where `node` is local."""
        graph, value, lengths = self.gm.graph, value_of(node), self.lengths(at)
        is_whole, dim = not isinstance(placement_of(node), Sharded), at.dim
        outer = value.shape[dim] // (lengths.value * at.inner)
        pieces: list[fx.Node] = []
        with graph.inserting_before(before):
            x = node
            if outer != 1:
                x = self._hold(aten.unflatten.int, (node, dim, [outer, -1]), node, placement_of(node))
                x.meta["val"] = torch.unflatten(value, dim, (outer, -1))
                dim += 1
            parts = tuple((sequence, at.inner * elements) for sequence, elements in lengths.parts)
            for (sequence, elements), (start, end) in zip(
                parts, pairwise(edges(self.gm, parts, is_local=not is_whole)), strict=True
            ):
                part = Sharded(dim, elements, sequence=sequence)
                piece = self._hold(aten.slice.Tensor, (x, dim, start, end), node, FULL if is_whole else part)
                shape = list(x.meta["val"].shape)
                shape[dim] = self.lengths(part).value * part.inner
                piece.meta["val"] = value.new_empty(shape)
                pieces.append(make(piece, part))
            joined = self._hold(aten.cat.default, (pieces, dim), node, FULL)
            if outer != 1:
                joined = self._hold(aten.flatten.using_ints, (joined, dim - 1, dim), node, FULL)
        is_local = isinstance(placement_of(pieces[0]), Sharded)
        annotate(joined, placement=at if is_local else Full(at), origin=annotation(node).origin or node.name)
        joined.meta["val"] = value
        return joined

    def _hold(self, target: Any, arguments: tuple[Any, ...], source: fx.Node, placement: Placement) -> fx.Node:
        """Insert a call that holds a part of the value of `source`, which no value of the captured graph is."""
        node = insert_copy(self.gm.graph, target, arguments, source, placement)
        annotate(node, origin="")
        return node

    def _behind(self, node: fx.Node) -> AbstractContextManager[Any]:
        """Return the insertion point for what reads `node`, as early as it can be."""
        if node.op == "placeholder":
            return self.gm.graph.inserting_before(self.first_call())
        return self.gm.graph.inserting_after(max([node, *Lengths.nodes_of(self.gm)]))

    def _extend(self, node: fx.Node, at: Sharded) -> fx.Node:
        """Return `node` with the tokens that its range leaves out filled in, so that it has one element for each token."""
        value = node.meta["val"]
        if at.inner != 1 or str(value.shape[at.dim]) != str(at.count(self.lengths(at).value)):
            raise NoRule(f"a range of tokens inside merged dims cannot be sharded.\n\n{where(node)}")
        pads = [0, 0] * (value.dim() - at.dim - 1) + [at.front, at.back]
        whole = insert_copy(self.gm.graph, aten.constant_pad_nd.default, (node, pads), node)
        annotate(whole, origin="")  # no value of the captured graph has this shape
        return whole

    def first_call(self) -> fx.Node:
        """Return the node behind the placeholders and the lengths."""
        last: fx.Node = max([*self.gm.graph.find_nodes(op="placeholder"), *Lengths.nodes_of(self.gm)]).next
        return last


def plus(graph: fx.Graph, a: fx.Node | int, b: fx.Node | int) -> fx.Node | int:
    """Return the graph argument a + b; inserts where the graph inserts."""
    return _combined(graph, operator.add, a, b)


def times(graph: fx.Graph, a: fx.Node | int, b: fx.Node | int) -> fx.Node | int:
    """Return the graph argument a * b; inserts where the graph inserts."""
    return a if b == 1 else _combined(graph, operator.mul, a, b)


def edges(gm: fx.GraphModule, parts: Parts, *, is_local: bool) -> list[fx.Node | int]:
    """Return where each part begins in a dim that has them behind one another, and where the last ends.

    Counts the slots of one rank, or all tokens; inserts where the graph inserts.
    """
    found: list[fx.Node | int] = [0]
    for sequence, elements in parts:
        lengths = Lengths.of(gm, sequence)
        count = times(gm.graph, lengths.local if is_local else lengths.total, elements)
        found.append(plus(gm.graph, found[-1], count))
    return found


def _combined(graph: fx.Graph, function: Any, a: fx.Node | int, b: fx.Node | int) -> fx.Node | int:
    if isinstance(a, int) and isinstance(b, int):
        return int(function(a, b))
    node = graph.call_function(function, (a, b))
    node.meta["val"] = function(*fx.map_arg((a, b), lambda x: x.meta["val"]))
    return node


def whole_placement(node: fx.Node) -> Placement | tuple[Placement, ...]:
    """Return the placement of the results of an operator that every rank computes whole."""
    value = value_of(node)
    return (FULL,) * len(value) if isinstance(value, tuple | list) else FULL


class Writer:
    """Writes the operators of a `Decision.lower` in place of a call."""

    def __init__(self, resharder: Resharder, call: Call, at: Sharded) -> None:
        self.call = call
        self._resharder = resharder
        lengths = resharder.lengths(at)
        self.length, self.local = lengths.total, lengths.local
        self._lengths, self._plan = lengths, resharder.plan
        self.has_padding = lengths.has_padding(resharder.plan)

    @property
    def axis(self) -> tuple[Any, ...]:
        """The last arguments of every operator that knows the layout: layout, world size, group, perhaps bounds."""
        return self._lengths.axis(self._plan)

    @property
    def chunks(self) -> int:
        """The number of globally ordered chunks that a rank holds.

        Raises:
            NoChunks: the layout has none.
        """
        layout, world_size = str(self.axis[0]), int(self.axis[1])
        if follows_documents(layout):
            raise NoChunks(
                f"{self.call.target} runs along the tokens in equal chunks, which the layout {layout} does not have: its runs "
                f"follow the documents.\n\n{where(self.call.node)}\n\nUse balancer='zig_zag' or 'contiguous'."
            )
        return num_chunks(world_size, layout) // world_size

    def insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call before the operator; its recorded value is what one rank holds."""
        node = self.call.node
        with node.graph.inserting_before(node):
            new = node.graph.call_function(target, args, kwargs)
        keep_source(new, node)
        values = fx.map_arg((args, kwargs), self._local_value)
        new.meta["val"] = fake_result(target, *values)
        annotate(new, is_local=True)
        return new

    def _local_value(self, node: fx.Node) -> Any:
        """Return a fake tensor of the shape that one rank holds."""
        value, at = value_of(node), annotation(node).placement
        if not is_tensor(node) or annotation(node).is_local or not isinstance(at, Sharded):
            return value
        lengths = self._resharder.lengths(at)
        local = lengths.local.meta["val"] if isinstance(lengths.local, fx.Node) else lengths.local
        shape = list(value.shape)
        shape[at.dim] = shape[at.dim] // at.count(lengths.value) * local
        return value.new_empty(shape)
