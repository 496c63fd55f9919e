"""Joining: sequences that ranks hold behind one another, and the ways from one arrangement of a dim to another.

before  x = aten.cat([text, image], 1)              # text, image: Sharded(1), of two sequences
after   x = aten.cat([text, image], 1)              # Sharded(1, sequence 2): each rank joins its own tokens, and nothing travels
        y = cp.rearrange_tokens(x, 1, [L, 1, S, 1], [L + S, 1], 0, ...)    # Sharded(1, sequence 3): dealt as one sequence

A joined sequence is right for all that looks at each token by itself, and for attention without an order. What needs the order
of the tokens takes them as the one sequence that they are.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.balance.layout import follows_documents
from cpcompile.errors import LengthDependent, NoChunks, NoRule, where
from cpcompile.ir.annotation import placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.operator_call import expression, value_of
from cpcompile.ir.placement import Sharded
from cpcompile.ir.plan import Lengths, Parts
from cpcompile.ir.resharding import UNKNOWN_OUTSIDE, Resharder, edges, times

aten, cp = torch.ops.aten, torch.ops.cpcompile

# How tokens are dealt that need equal chunks, or are of a sequence without documents, where the layout follows documents.
CHUNKED = "contiguous"


class Joiner:
    """Numbers the sequences that a model makes of those that it is given, and moves values between them."""

    def __init__(self, resharder: Resharder) -> None:
        self.gm, self.plan, self.resharder = resharder.gm, resharder.plan, resharder
        self._rearranged: dict[tuple[fx.Node, Sharded], fx.Node] = {}

    def sequence(self, size: Any, node: fx.Node) -> int:
        """Return the number of the sequence of `size` tokens, which `node` needs.

        It is dealt contiguously where the layout follows documents, which only the sequences of the inputs have.

        Raises:
            NoRule: the size is not known from the inputs.
        """
        known = Lengths.find(self.gm, size, lambda x: x.is_of_tokens or self._is_in_chunks(x))
        if known is not None:
            return known
        with self._at_the_top():
            total = size if isinstance(size, int) else self._derived(size, node)
            lengths = Lengths.of_total(self.gm, self.plan, size, total)
        return (replace(lengths, layout=CHUNKED) if follows_documents(self.plan.layout) else lengths).add(self.gm)

    def in_chunks(self, at: Sharded) -> Sharded:
        """Return the placement of the same tokens in equal chunks, where the layout of their sequence follows documents."""
        of = Lengths.of(self.gm, at.sequence)
        if not (of.is_of_tokens and follows_documents(self.plan.layout)):
            return at
        known = Lengths.find(self.gm, of.value, self._is_in_chunks)
        return replace(at, sequence=replace(of, layout=CHUNKED, bounds=None).add(self.gm) if known is None else known)

    def in_order(self, at: Sharded) -> Sharded:
        """Return the placement of the same tokens as the layout deals those of inputs."""
        of = Lengths.of(self.gm, at.sequence)
        known = Lengths.find(self.gm, of.value, lambda x: x.is_of_tokens) if self._is_in_chunks(of) else None
        return at if known is None else replace(at, sequence=known)

    def _is_in_chunks(self, lengths: Lengths) -> bool:
        return lengths.layout == CHUNKED and follows_documents(self.plan.layout)

    def joined(self, parts: Parts, node: fx.Node) -> int:
        """Return the number of the sequence that has `parts` behind one another; one part by itself is that sequence."""
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        self._refuse_documents(node)
        for number, lengths in enumerate(Lengths.all_of(self.gm)):
            if lengths.parts == parts and not lengths.layout:
                return number
        of = [(Lengths.of(self.gm, sequence), elements) for sequence, elements in parts]
        value = sum(lengths.value * elements for lengths, elements in of)
        with self._at_the_top():
            total, local = (edges(self.gm, parts, is_local=is_local)[-1] for is_local in (False, True))
        is_padded = any(lengths.has_padding(self.plan) for lengths, _ in of)
        return Lengths(value, total, local, parts=parts, is_padded=is_padded).add(self.gm)

    def slots(self, joined: int) -> int:
        """Return the number of the sequence that the slots of all ranks are, laid end to end, padding included."""
        of = Lengths.of(self.gm, joined)
        with self._at_the_top():
            total = times(self.gm.graph, of.local, self.plan.world_size)
        value = total if isinstance(total, int) else total.meta["val"]
        known = Lengths.find(self.gm, value, lambda x: x.layout == "contiguous")
        slots = Lengths(value, total, of.local, is_padded=False, layout="contiguous")
        return slots.add(self.gm) if known is None else known

    def parts_of(self, at: Sharded) -> Parts:
        """Return what one period of the dim of a placement is made of."""
        parts = Lengths.of(self.gm, at.sequence).parts or ((at.sequence, 1),)
        return tuple((sequence, elements * at.inner) for sequence, elements in parts)

    def outer_of(self, size: Any, at: Sharded) -> Any:
        """Return how often a dim of this size has all tokens of a placement behind one another; an expression if not a number."""
        tokens = expression(at.count(Lengths.of(self.gm, at.sequence).value))
        outer = sympy.cancel(expression(size) / (tokens * at.inner))
        return int(outer) if outer.is_Integer else outer

    def is_plain(self, size: Any, at: Sharded) -> bool:
        """Tell whether a dim of this size has one element for each token of one sequence, in its order."""
        return at.inner == 1 and not Lengths.of(self.gm, at.sequence).parts and self.outer_of(size, at) == 1

    def can_rearrange(self, at: Sharded) -> bool:
        """Tell whether what a placement holds outside the sequence, if anything, is what a rearrangement writes there: zeros."""
        return not at.reaches_outside or at.outside == 0.0

    def in_slots(self, size: Any, at: Sharded, node: fx.Node) -> Sharded:
        """Return the placement of a dim of this size as one joined sequence, which the ranks hold as they do now."""
        outer = self.outer_of(size, at)
        if not isinstance(outer, int) or not at.covers_all:
            raise LengthDependent(
                f"a dim of {size} holds ranges of tokens, or an unknown number of sequences.\n\n{where(node)}"
            )
        return Sharded(at.dim, sequence=self.joined(self.parts_of(at) * outer, node))

    def plain(self, node: fx.Node) -> fx.Node:
        """Return a sharded value whose dim is dealt to the ranks as one sequence, in its order."""
        at = placement_of(node)
        assert isinstance(at, Sharded)
        size = value_of(node).shape[at.dim]
        return self.rearranged(node, Sharded(at.dim, sequence=self.sequence(size, node)))

    def rearranged(self, node: fx.Node, to: Sharded) -> fx.Node:
        """Return a sharded value in another arrangement of the same dim."""
        at = placement_of(node)
        assert isinstance(at, Sharded) and at.dim == to.dim
        if at == to:
            return node
        is_same_range = replace(at, sequence=to.sequence) == to
        if not is_same_range and (to.reaches_outside or not self.can_rearrange(at)):
            raise NoRule(f"{UNKNOWN_OUTSIDE}.\n\n{where(node)}")
        if (node, to) not in self._rearranged:
            size = value_of(node).shape[at.dim]
            outers = [self.outer_of(size, place) for place in (at, to)]
            times_each = (1, 1) if str(outers[0]) == str(outers[1]) else tuple(outers)
            if not all(isinstance(n, int) for n in times_each) or (times_each != (1, 1) and not at.covers_all):
                raise LengthDependent(f"a dim of {size} holds an unknown number of sequences.\n\n{where(node)}")
            offset = at.front * at.inner - to.front * to.inner
            places = [self.spelled(place, n) for place, n in zip((at, to), times_each, strict=True)]
            of, target = (Lengths.of(self.gm, place.sequence) for place in (at, to))
            if any(x.bounds is not None for x in (of, target)) and any(len(place) > 2 for place in places):
                self._refuse_documents(node)
            layouts = of.layout or self.plan.layout, target.layout or self.plan.layout
            bounds = of.bounds or target.bounds
            axis: tuple[Any, ...] = (layouts[0], self.plan.world_size, self.plan.group)
            if bounds is not None or layouts[0] != layouts[1]:
                axis = (*axis, layouts[1], bounds)
            with self.gm.graph.inserting_before(max([node, *Lengths.bounds_of(self.gm)]).next):
                arguments = (node, at.dim, *places, offset, True, *axis)
                self._rearranged[node, to] = insert_copy(
                    self.gm.graph, cp.rearrange_tokens.default, arguments, node, to
                )
        return self._rearranged[node, to]

    def spelled(self, at: Sharded, outer: int = 1) -> list[fx.Node | int]:
        """Return the arrangement of a placement as operators spell it."""
        pairs = [(Lengths.of(self.gm, sequence).total, elements) for sequence, elements in self.parts_of(at) * outer]
        return [argument for pair in pairs for argument in pair]

    def _at_the_top(self) -> Any:
        return self.gm.graph.inserting_before(self.resharder.first_call())

    def _derived(self, size: Any, node: fx.Node) -> fx.Node:
        """Return a node for a symbolic size, of lengths that are known or of an input; inserts where the graph inserts."""
        graph = self.gm.graph
        wanted = expression(size)

        def call(target: Any, *arguments: Any) -> fx.Node:
            new = graph.call_function(target, arguments)
            new.meta["val"] = size
            return new

        for lengths in Lengths.all_of(self.gm):
            if not isinstance(lengths.total, fx.Node) or not isinstance(lengths.value, torch.SymInt):
                continue
            known = expression(lengths.value)
            difference, ratio = sympy.expand(wanted - known), sympy.cancel(wanted / known)
            if difference.is_Integer:
                return call(operator.add, lengths.total, int(difference))
            if ratio.is_Integer:
                return call(operator.mul, lengths.total, int(ratio))
            if ratio.is_Rational:
                return call(operator.floordiv, lengths.total, int(1 / ratio))
        for placeholder in graph.find_nodes(op="placeholder"):
            value = value_of(placeholder)
            for dim, found in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if str(found) == str(size):
                    return call(aten.sym_size.int, placeholder, dim)
        raise LengthDependent(f"the number of tokens {size} is not known from the inputs.\n\n{where(node)}")

    def _refuse_documents(self, node: fx.Node) -> None:
        if follows_documents(self.plan.layout):
            raise NoChunks(
                f"sequences are joined, cut or grouped here, of which the layout {self.plan.layout!r} knows no documents."
                f"\n\n{where(node)}\n\nUse balancer='zig_zag' or 'contiguous'."
            )


def regrouped(at: Sharded, sequence: int, elements: int) -> Sharded:
    """Return the placement in which each `elements` tokens of `at` are one token of another sequence."""
    return replace(at, inner=at.inner * elements, sequence=sequence)
