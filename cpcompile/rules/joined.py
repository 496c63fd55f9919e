"""Joined and grouped tokens: what is done where tokens are not one sequence in its order, or change how they are grouped.

before  x = aten.cat([text, image], 1); o = cp.attention(q, k, v); y = aten.slice(o, 1, L); p = aten.view(x, [B, S // 4, 4, D])
after   x is a joined sequence, of which every rank has its part of the text and of the image; attention sees the slots of all
        ranks, laid end to end; y is the image again; the tokens of x go in groups of 4 to the ranks that hold these

Order is what costs: an operator that needs it gets the tokens as one sequence, which travel for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.balance.layout import follows_documents
from cpcompile.errors import LengthDependent, NoChunks, NoRule
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_copy, keep_source
from cpcompile.ir.joining import Joiner, Parts, regrouped
from cpcompile.ir.operator_call import Call, expression, value_of
from cpcompile.ir.placement import FULL, Full, Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.ir.resharding import plus, times
from cpcompile.rules.convolution import CONVOLUTIONS
from cpcompile.rules.groups import POOLS, stride_along
from cpcompile.rules.localisation import Localiser
from cpcompile.rules.pointwise import is_one
from cpcompile.rules.ranges import bounds, place_of
from cpcompile.rules.registry import Decision
from cpcompile.rules.views import locate_tokens, quotient

aten, cp = torch.ops.aten, torch.ops.cpcompile

JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default}
VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
}
CUTS = {aten.slice.Tensor, aten.narrow.default, aten.select.int}
SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
}
# What models begin with that leaves fewer tokens, or more.
STEMS = {*CONVOLUTIONS, *POOLS, aten.unfold.default, aten.pad.default, aten.constant_pad_nd.default, *JOINS}
# Operators whose rules write others that do not ask how the tokens are dealt to the ranks.
LOCAL_LOWERINGS = {aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims}


class JoinedTokens:
    """Changes calls, so that rules apply which know only one sequence in its order."""

    def __init__(self, joiner: Joiner, localiser: Localiser) -> None:
        self.joiner, self.localiser, self.gm = joiner, localiser, joiner.gm
        self.unknown: LengthDependent | None = None  # why a stem is not one of tokens, for all lengths
        # What lets a rule apply, the cheapest first; each edits the operands of a call, and tells whether it did.
        self.changes = (self.align, self.regroup, self.group, self.straighten)

    def is_joined(self, at: Placement) -> bool:
        """Tell whether a value has the tokens of several sequences behind one another."""
        return isinstance(at, Sharded) and bool(Lengths.of(self.gm, at.sequence).parts)

    def takes(self, call: Call, decision: Decision) -> bool:
        """Tell whether a decision is right for joined tokens, whose order and ranges no rank knows by arithmetic."""
        is_local = decision.lower is None or call.target in LOCAL_LOWERINGS
        draws = torch.Tag.nondeterministic_seeded in call.target.tags and self.joiner.plan.exact_dropout
        are_whole = all(at.covers_all for at in decision.results if isinstance(at, Sharded) and self.is_joined(at))
        return is_local and are_whole and not draws

    # Cuts: a part of what was joined is there already.

    def pieces(self, node: fx.Node, call: Call) -> list[fx.Node]:
        """Return slices that take the place of a split of joined tokens, not placed yet; none for other calls."""
        if call.target not in SPLITS or not self.is_joined(at := placement_of(call["self"])):
            return []
        assert isinstance(at, Sharded)
        if at.dim != call.dim("dim", "self") or not at.covers_all or at.inner != 1:
            return []
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

    def _size(self, size: Any) -> fx.Node | int:
        """Return the graph argument for a size that is a sum of lengths; inserts where the graph inserts."""
        if isinstance(size, int):
            return size
        for lengths in Lengths.all_of(self.gm):
            rest = sympy.expand(expression(size) - expression(lengths.value))
            if rest.is_Integer:
                return plus(self.gm.graph, lengths.total, int(rest))
        raise NoRule(f"{size} tokens are cut off, of which no sequence is known")

    def cut(self, node: fx.Node, call: Call) -> fx.Node | None:
        """Return what a cut of joined tokens reads in place of all of them: the sequences that it needs."""
        if call.target not in CUTS or not isinstance(at := placement_of(call["self"]), Sharded):
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
        edges = [sympy.Integer(0)]
        for sequence, elements in parts:
            edges.append(sympy.expand(edges[-1] + expression(Lengths.of(self.gm, sequence).value) * elements))
        first = max((i for i, edge in enumerate(edges[:-1]) if is_known(start - edge)), default=0)
        last = min((i for i, edge in enumerate(edges) if i > first and is_known(edge - stop)), default=len(parts))
        if last - first == len(parts):
            return None
        piece = self._parts(node, x, at.dim, parts, first, last)
        if call.target is aten.select.int:
            changes = {"index": self._moved_back(start, edges[first])}
        elif sympy.expand(start - edges[first]) == 0 and sympy.expand(stop - edges[last]) == 0:
            return piece
        else:
            length = sympy.expand(stop - start)
            begin = sympy.expand(start - edges[first])
            if not begin.is_Integer or not length.is_Integer:
                return None
            changes = {"start": int(begin)} | (
                {"length": int(length)} if "length" in call else {"end": int(begin + length)}
            )
        with self.gm.graph.inserting_before(node):
            new = self.gm.graph.call_function(call.target, *call.rebound({"self": piece, **changes}))
        new.meta = dict(node.meta)
        annotate(new, placement=FULL, origin=annotation(node).origin or node.name)
        return new

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
        graph = self.gm.graph
        wanted = parts[first:last]
        if len(wanted) == 1:
            ((sequence, elements),) = wanted
            to = Sharded(dim, elements, sequence=sequence)
        else:
            to = Sharded(dim, sequence=self.joiner.joined(wanted, node))
        with graph.inserting_before(node):
            ends: list[fx.Node | int] = []
            for upto in (parts[:first], parts[:last]):
                slots: fx.Node | int = 0
                for sequence, elements in upto:
                    slots = plus(graph, slots, times(graph, Lengths.of(self.gm, sequence).local, elements))
                ends.append(slots)
            piece = insert_copy(graph, aten.slice.Tensor, (x, dim, *ends), node, to)
        value = value_of(x)
        shape = list(value.shape)
        shape[dim] = Lengths.of(self.gm, to.sequence).value * to.inner
        piece.meta["val"] = value.new_empty(shape)
        is_all = [str(n) for n in shape] == [str(n) for n in value_of(node).shape]
        annotate(piece, origin=(annotation(node).origin or node.name) if is_all else "")
        return piece

    def scattered(self, node: fx.Node, call: Call) -> list[fx.Node]:
        """Return what takes the place of tokens written over a part of joined ones: slices and their join, not placed yet."""
        if call.target is not aten.slice_scatter.default or call["step"] != 1:
            return []
        x, at = call["self"], placement_of(call["self"])
        dim = call.dim("dim", "self")
        size = call.shape("self")[dim]
        if not isinstance(at, Sharded) or at.dim != dim or self.joiner.is_plain(size, at):
            return []
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
        return [*(piece for _, piece in made), joined]

    # Joins.

    def join(self, node: fx.Node, call: Call) -> bool:
        """Join operands along their tokens, each of which becomes a sequence of its own; tells whether that is what is done."""
        if call.target not in JOINS:
            return False
        dim = int(call["dim"]) % call.result.dim()
        # What has no element is left where it is: torch joins an empty vector with anything.
        operands = {n: x for n, x in call.operands() if len(call.shape(n)) > dim and str(call.shape(n)[dim]) != "0"}
        placements = {name: placement_of(operand) for name, operand in operands.items()}
        if any(isinstance(at, Sharded) and at.dim != dim for at in placements.values()):
            return False
        parts: list[tuple[int, int]] = []
        changes: dict[str, fx.Node] = {}
        for name, operand in operands.items():
            at, size = placements[name], call.shape(name)[dim]
            if not isinstance(at, Sharded):
                to = Sharded(dim, sequence=self.joiner.sequence(size, node))
                changes[name] = self.localiser.localise(operand, to)
            else:
                outer = self.joiner.outer_of(size, at)
                is_held = at.covers_all and isinstance(outer, int)
                changes[name] = operand if is_held else self.joiner.plain(operand)
                to = self.joiner.in_slots(size, at, node) if is_held else placement_of(changes[name])  # type: ignore[assignment]
            parts += self.joiner.parts_of(to)
        node.args, node.kwargs = call.rebound(changes)
        annotate(node, placement=Sharded(dim, sequence=self.joiner.joined(tuple(parts), node)))
        return True

    # Groups.

    def regroup(self, node: fx.Node, call: Call) -> bool:
        """Bring tokens in groups to the ranks, for a view that makes a dim of these; tells whether it changed the operand."""
        if call.target not in VIEWS:
            return False
        x = call["self"]
        at, shape, target = placement_of(x), call.shape("self"), tuple(call.result.shape)
        if not isinstance(at, Sharded) or self.is_joined(at) or not at.covers_all:
            return False
        length, stride = expression(Lengths.of(self.gm, at.sequence).value), expression(at.inner)
        for size in shape[at.dim + 1 :]:
            stride *= expression(size)
        after = sympy.Integer(1)
        for size in reversed(target):
            elements = quotient(after, stride)
            groups = None
            if elements is not None and elements.is_Integer and elements > 1:
                groups = quotient(length, elements)
            if elements is not None and groups is not None and groups != 1:
                number = self._groups(call, int(elements), groups, node)
                to = None if number is None else regrouped(at, number, int(elements))
                if to is not None and locate_tokens(shape, target, to, Lengths.of(self.gm, to.sequence).value):
                    node.args, node.kwargs = call.rebound({"self": self.joiner.rearranged(x, to)})
                    return True
            after *= expression(size)
        return False

    def group(self, node: fx.Node, call: Call) -> bool:
        """Bring tokens in groups to the ranks, for an operator that reads them group by group; tells whether it did."""
        name = next((n for n in ("self", "input") if n in call), "")
        at = placement_of(call[name]) if name and isinstance(call[name], fx.Node) else None
        stride = stride_along(call, at.dim) if isinstance(at, Sharded) else None
        if not isinstance(at, Sharded) or stride is None or stride == 1 or at.inner == stride or not at.covers_all:
            return False
        size = expression(call.shape(name)[at.dim])
        if not size.is_Integer or size % stride or not self.joiner.is_plain(int(size), at):
            return False
        to = regrouped(at, self.joiner.sequence(int(size) // stride, node), stride)
        node.args, node.kwargs = call.rebound({name: self.joiner.rearranged(call[name], to)})
        return True

    def stem(self, node: fx.Node, call: Call, hints: Mapping[str, Sharded]) -> Mapping[str, Sharded]:
        """Return where an operand of a whole call holds tokens, in groups for one that reads them so.

        What makes other tokens of them (an overlapping stride, a pool, a token before the first) is whole, and holds these.
        """
        if call.target not in STEMS:
            return hints
        name, at = next(iter(hints.items()))
        size = call.shape(name)[at.dim]
        if at.dim >= call.results[0].dim() or not at.covers_all or not self.joiner.is_plain(size, at):
            return hints
        left = call.results[0].shape[at.dim]
        if str(left) == str(size):
            return hints
        try:
            to = Sharded(at.dim, sequence=self.joiner.sequence(left, node))
        except NoChunks:
            return hints
        except LengthDependent as error:
            self.unknown = self.unknown or error
            return hints
        stride = stride_along(call, at.dim)
        if stride is not None and statically_known_true(left * stride == size):
            return {name: replace(to, inner=stride)}
        annotate(node, placement=(Full(to),) * len(call.results) if call.is_tuple else Full(to))
        return {}

    def _groups(self, call: Call, elements: int, groups: sympy.Expr, node: fx.Node) -> int | None:
        """Return the sequence of the groups: their number is a size of the result, or a factor of one."""
        if groups.is_Integer:
            return self.joiner.sequence(int(groups), node)
        for size in call.result.shape:
            if isinstance(size, torch.SymInt) and sympy.expand(expression(size) - groups) == 0:
                return self.joiner.sequence(size, node)
        return None

    # Order.

    def straighten(self, node: fx.Node, call: Call) -> bool:
        """Deal operands to the ranks as one sequence in its order; tells whether any was not."""
        changes = {}
        for name, operand in call.operands():
            at = placement_of(operand)
            if not isinstance(at, Sharded) or at.reaches_outside:
                continue
            if not at.covers_all or not self.joiner.is_plain(value_of(operand).shape[at.dim], at):
                changes[name] = self.joiner.plain(operand)
        if changes:
            node.args, node.kwargs = call.rebound(changes)
        return bool(changes)

    def align(self, node: fx.Node, call: Call) -> bool:
        """Bring operands that hold as many tokens in different sequences to one of these; tells whether there were any."""
        sharded = {n: (o, p) for n, o in call.operands() if isinstance(p := placement_of(o), Sharded)}
        kinds = {replace(at, dim=0, outside=None) for _, at in sharded.values()}
        sizes = {str(value_of(operand).shape[at.dim]) for operand, at in sharded.values()}
        if len(kinds) < 2 or len(sizes) > 1:
            return False

        def cost(at: Sharded) -> tuple[Any, ...]:
            # To the last field, so that all ranks choose the same.
            return not at.covers_all, self.is_joined(at), at.inner, at.sequence, at.front, at.back

        to = min(kinds, key=cost)
        changes = {
            name: self.joiner.rearranged(operand, replace(to, dim=at.dim)) for name, (operand, at) in sharded.items()
        }
        node.args, node.kwargs = call.rebound(changes)
        return True

    def output(self, node: fx.Node) -> fx.Node:
        """Return what a rank gives back for a value: its part of one sequence, as `unshard` and `shard` know it."""
        at = annotation(node).placement
        if self.joiner.plan.outputs == "full" or not isinstance(at, Sharded) or at.reaches_outside:
            return node
        is_one = self.joiner.outer_of(value_of(node).shape[at.dim], at) == 1
        is_other = not at.covers_all or (at.inner != 1 and is_one)
        is_other = is_other and not follows_documents(self.joiner.plan.layout)
        return self.joiner.plain(node) if self.is_joined(at) or is_other else node

    # Attention.

    def attend(self, node: fx.Node, call: Call) -> fx.Node | None:
        """Return an attention over the slots of all ranks that takes the place of one over joined or grouped tokens.

        It is not placed yet. None where tokens are one sequence in its order, or have been brought to it.
        """
        given = {
            name: at for name in ("q", "k", "v") if isinstance(at := placement_of(call[name]), Sharded) and at.dim == 2
        }
        sizes = {str(call.shape(name)[2]) for name in ("q", "k", "v")}
        self._gather_keys_of_rows(node, call)
        if "q" not in given or len(sizes) > 1:
            return None
        size, at = call.shape("q")[2], given["q"]
        if all(self.joiner.is_plain(size, each) for each in given.values()):
            if len({each.sequence for each in given.values()}) < 2:
                return None
            self.align(node, call)
            return None
        has_order = call["is_causal"] or call["window"] or call["lookahead"] >= 0
        has_order = has_order or call["prefix"] is not None or call["slopes"] is not None
        if has_order or set(given.values()) != {at} or not at.covers_all or len(given) < 3:
            self.straighten(node, call)
            return None
        return self._attend_slots(node, call, at, size)

    def _gather_keys_of_rows(self, node: fx.Node, call: Call) -> None:
        """Make keys whole that are sharded in another way than queries whose tokens are rows of the batch, or heads."""
        at = placement_of(call["q"])
        if not isinstance(at, Sharded) or at.dim >= 2:
            return
        keys = {name: call[name] for name in ("k", "v") if placement_of(call[name]) not in (at, FULL)}
        keys = {name: x for name, x in keys.items() if isinstance(placement_of(x), Sharded)}
        if keys:
            reason = "keys and values of queries that are sharded by rows"
            node.args, node.kwargs = call.rebound({n: self.joiner.resharder.gather(x, reason) for n, x in keys.items()})

    def _attend_slots(self, node: fx.Node, call: Call, at: Sharded, size: Any) -> fx.Node:
        joined = self.joiner.in_slots(size, at, node)
        of_joined = Lengths.of(self.gm, joined.sequence)
        slots = Sharded(2, sequence=self.joiner.slots(joined.sequence))
        of_slots = Lengths.of(self.gm, slots.sequence)
        graph = self.gm.graph

        def insert(target: Any, *arguments: Any, value: torch.Tensor, placement: Placement = FULL) -> fx.Node:
            with graph.inserting_before(node):
                new = graph.call_function(target, arguments)
            keep_source(new, node)
            new.meta["val"] = value
            annotate(new, placement=placement)
            return new

        def of_size(x: torch.Tensor, *dims: int) -> torch.Tensor:
            shape = [of_slots.value if d in [n % x.dim() for n in dims] else s for d, s in enumerate(x.shape)]
            return x.new_empty(shape)

        def relabelled(x: fx.Node) -> fx.Node:
            return insert(aten.alias.default, x, value=of_size(value_of(x), 2), placement=slots)

        changes: dict[str, Any] = {name: relabelled(call[name]) for name in ("q", "k", "v")}
        like = value_of(call["q"])
        places = like.new_empty(of_slots.value, dtype=torch.int64)
        has_terms = any(call[name] is not None for name in ("documents", "key_padding", "mask"))
        if has_terms or of_joined.is_padded:
            axis = self.joiner.plan.layout, self.joiner.plan.world_size
            with graph.inserting_before(node):
                spelled = self.joiner.spelled(joined)
            order = insert(cp.arranged_positions.default, call["q"], spelled, *axis, value=places)
            held = insert(aten.ge.Scalar, order, 0, value=places.new_empty(places.shape, dtype=torch.bool))
            source = insert(aten.clamp.default, order, 0, value=places)

            def picked(x: fx.Node, dim: int) -> fx.Node:
                return insert(aten.index_select.default, x, dim, source, value=of_size(value_of(x), dim))

            for name in ("documents", "key_padding"):
                if call[name] is not None:
                    changes[name] = picked(self._whole(call[name]), 1)
            if of_joined.is_padded:
                batch = like.shape[0]
                row = insert(aten.unsqueeze.default, held, 0, value=value_of(held)[None])
                if call["key_padding"] is not None:
                    value = value_of(changes["key_padding"])
                    changes["key_padding"] = insert(
                        aten.logical_and.default,
                        changes["key_padding"],
                        row,
                        value=value.new_empty(value.shape, dtype=torch.bool),
                    )
                else:
                    with graph.inserting_before(node):
                        rows = (
                            batch if isinstance(batch, int) else graph.call_function(aten.sym_size.int, (call["q"], 0))
                        )
                    sizes = [rows, of_slots.total]
                    value = value_of(row).expand(batch, of_slots.value)
                    changes["key_padding"] = insert(aten.expand.default, row, sizes, value=value)
            if call["mask"] is not None:
                mask = self._whole(call["mask"])
                if not is_one(value_of(mask).shape[-1]):
                    mask = picked(mask, value_of(mask).dim() - 1)
                if not is_one(value_of(mask).shape[-2]):
                    mask = picked(mask, value_of(mask).dim() - 2)
                changes["mask"] = mask
        args, kwargs = call.rebound(changes)
        new = insert(call.target, *args, value=of_size(value_of(node), 2))
        new.kwargs = kwargs
        annotate(new, strategy=annotation(node).strategy, site=node.name)
        return new

    def _whole(self, x: fx.Node) -> fx.Node:
        return x if isinstance(placement_of(x), Full) else self.joiner.resharder.gather(x, "a mask of joined tokens")

    def back(self, node: fx.Node, attended: fx.Node) -> fx.Node:
        """Return the result of an attention over slots as that of `node`, over joined or grouped tokens."""
        at = placement_of(Call.of(node)["q"])
        with self.gm.graph.inserting_before(node):
            return insert_copy(self.gm.graph, aten.alias.default, (attended,), node, at)


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
