"""Cuts of joined tokens: a split, a slice or a write over some of them reads the sequences that it needs, which every rank has.

before  o = cp.attention(q, k, v); y = aten.slice(o, 1, L)      # o: the tokens of text and image behind one another
after   y = aten.slice(o, 1, L_local)                           # each rank's tokens of the image
"""

from __future__ import annotations

from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.errors import NoRule
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.joining import Joiner
from cpcompile.ir.operator_call import Call, expression, value_of
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.ir.plan import Lengths, Parts
from cpcompile.ir.resharding import edges, plus
from cpcompile.rules.ranges import bounds, place_of

aten = torch.ops.aten

CUTS = {aten.slice.Tensor, aten.narrow.default, aten.select.int}
SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
}


class Cuts:
    """Puts cuts of each rank's own tokens in the place of cuts of joined ones.

    Each method returns the calls that are to be placed, in their order; nobody reads `node` then. It returns None for what is
    no cut of joined tokens.
    """

    def __init__(self, joiner: Joiner) -> None:
        self.joiner, self.gm = joiner, joiner.gm

    def split(self, node: fx.Node, call: Call) -> list[fx.Node] | None:
        """Put a slice in the place of each piece of a split."""
        at = placement_of(call["self"])
        if not isinstance(at, Sharded) or not Lengths.of(self.gm, at.sequence).parts:
            return None
        if at.dim != call.dim("dim", "self") or not at.covers_all or at.inner != 1:
            return None
        new, start = {}, 0
        for index, part in enumerate(call.results):
            end = start + part.shape[at.dim]
            new[index] = (start, end, part)
            start = end
        pieces = []
        for item in list(node.users):
            first, last, part = new[item.args[1]]  # type: ignore[index]
            with self.gm.graph.inserting_before(item):
                ends = [self._size(size) for size in (first, last)]
                piece = insert_copy(self.gm.graph, aten.slice.Tensor, (call["self"], at.dim, *ends), item)
            piece.meta["val"] = part
            annotate(piece, origin=annotation(item).origin or item.name)
            item.replace_all_uses_with(piece)
            pieces.append(piece)
        return pieces

    def scatter(self, node: fx.Node, call: Call) -> list[fx.Node] | None:
        """Join what is left of the tokens and what is written over the others."""
        if call["step"] != 1:
            return None
        x, at = call["self"], placement_of(call["self"])
        dim = call.dim("dim", "self")
        size = call.shape("self")[dim]
        if not isinstance(at, Sharded) or at.dim != dim or self.joiner.is_plain(size, at):
            return None
        (start, stop), source = bounds_of_scatter(call), call["src"]
        graph, made = self.gm.graph, []
        with graph.inserting_before(node):
            for first, last in ((sympy.Integer(0), start), (stop, expression(size))):
                count = sympy.expand(last - first)
                if count == 0:
                    continue
                ends = [self._size(as_size(edge, size)) for edge in (first, last)]
                piece = insert_copy(graph, aten.slice.Tensor, (x, dim, *ends), node)
                shape = list(value_of(x).shape)
                shape[dim] = as_size(count, size)
                piece.meta["val"] = value_of(x).new_empty(shape)
                annotate(piece, origin="")
                made.append((first, piece))
            parts = [piece for first, piece in made if first == 0]
            parts += [source, *(piece for first, piece in made if first != 0)]
            joined = insert_copy(graph, aten.cat.default, (parts, dim), node)
        node.replace_all_uses_with(joined)
        return [*(piece for _, piece in made), joined]

    def cut(self, node: fx.Node, call: Call) -> list[fx.Node] | None:
        """Let a slice, or one token, be cut off the sequences that it needs."""
        if not isinstance(at := placement_of(call["self"]), Sharded):
            return None
        x, dim = call["self"], call.dim("dim", "self")
        outer = self.joiner.outer_of(call.shape("self")[dim], at)
        if dim != at.dim or not at.covers_all or not isinstance(outer, int):
            return None
        parts = self.joiner.parts_of(at) * outer
        found = self._read(call, dim) if len(parts) > 1 else None
        if found is None:
            return None
        start, stop = found
        places = [sympy.Integer(0)]  # where each part begins, and where the last ends
        for sequence, elements in parts:
            places.append(sympy.expand(places[-1] + expression(Lengths.of(self.gm, sequence).value) * elements))
        first = max((i for i, place in enumerate(places[:-1]) if is_known(start - place)), default=0)
        last = min((i for i, place in enumerate(places) if i > first and is_known(place - stop)), default=len(parts))
        if last - first == len(parts):
            return None
        piece = self._parts(node, x, at.dim, parts, first, last)
        if call.target is aten.select.int:
            changes = {"index": self._moved_back(start, places[first])}
        elif sympy.expand(start - places[first]) == 0 and sympy.expand(stop - places[last]) == 0:
            node.replace_all_uses_with(piece)
            return []
        else:
            length = sympy.expand(stop - start)
            begin = sympy.expand(start - places[first])
            if not begin.is_Integer or not length.is_Integer:
                return None
            changes = {"start": int(begin)} | (
                {"length": int(length)} if "length" in call else {"end": int(begin + length)}
            )
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.call_function(call.target, *call.rebound({"self": piece, **changes}))
        new.meta = dict(node.meta)
        annotate(new, placement=FULL, origin=annotation(node).origin or node.name)
        node.replace_all_uses_with(new)
        return [new]

    def _size(self, size: Any) -> fx.Node | int:
        """Return the graph argument for a size that is a sum of lengths; inserts where the graph inserts."""
        if isinstance(size, int):
            return size
        for lengths in Lengths.all_of(self.gm):
            rest = sympy.expand(expression(size) - expression(lengths.value))
            if rest.is_Integer:
                return plus(self.gm.graph, lengths.total, int(rest))
        raise NoRule(f"{size} tokens are cut off, of which no sequence is known")

    def _read(self, call: Call, dim: int) -> tuple[sympy.Expr, sympy.Expr] | None:
        """Return which places a cut reads: from the first to behind the last."""
        size = expression(call.shape("self")[dim])
        if call.target is aten.slice.Tensor:
            return bounds(call) if call["step"] == 1 else None
        start = place_of(call["index" if call.target is aten.select.int else "start"], size)
        count = 1 if call.target is aten.select.int else expression(call.result.shape[dim])
        return start, sympy.expand(start + count)

    def _moved_back(self, start: sympy.Expr, edge: sympy.Expr) -> int:
        rest = sympy.expand(start - edge)
        if not rest.is_Integer:
            raise NoRule("a token is read whose place in its sequence is not known")
        return int(rest)

    def _parts(self, node: fx.Node, x: fx.Node, dim: int, parts: Parts, first: int, last: int) -> fx.Node:
        """Return the local tokens of some of the sequences that were joined along a dim."""
        wanted = parts[first:last]
        if len(wanted) == 1:
            ((sequence, elements),) = wanted
            to = Sharded(dim, elements, sequence=sequence)
        else:
            to = Sharded(dim, sequence=self.joiner.joined(wanted, node))
        with self.gm.graph.inserting_before(node):
            ends = edges(self.gm, parts[:last], is_local=True)
            piece = insert_copy(self.gm.graph, aten.slice.Tensor, (x, dim, ends[first], ends[last]), node, to)
        value = value_of(x)
        shape = list(value.shape)
        shape[dim] = Lengths.of(self.gm, to.sequence).value * to.inner
        piece.meta["val"] = value.new_empty(shape)
        is_all = [str(n) for n in shape] == [str(n) for n in value_of(node).shape]
        annotate(piece, origin=(annotation(node).origin or node.name) if is_all else "")
        return piece


def bounds_of_scatter(call: Call) -> tuple[sympy.Expr, sympy.Expr]:
    """Return the first place that a `slice_scatter` of step 1 writes, and the place behind the last."""
    dim = call.dim("dim", "self")
    first = place_of(call["start"], expression(call.shape("self")[dim]))
    return first, sympy.expand(first + expression(call.shape("src")[dim]))


def as_size(place: sympy.Expr, like: Any) -> Any:
    """Return a place as a size: a number, or an expression of the symbols of `like`."""
    if place.is_Integer:
        return int(place)
    return (
        like + int(rest)
        if (rest := sympy.expand(place - expression(like))).is_Integer
        else like.node.shape_env.create_symintnode(place, hint=None)
    )


def is_known(difference: sympy.Expr) -> bool:
    """Tell whether a difference of places is known to be at least 0; lengths are positive."""
    found = sympy.expand(difference)
    if found.is_Integer:
        return bool(found >= 0)
    return all(term.could_extract_minus_sign() is False for term in sympy.Add.make_args(found))
