"""Regrouping: tokens that a model takes in groups are brought to the ranks that hold whole groups.

before  p = aten.view(x, [B, S // 4, 4, D])
after   x_1 = cp.rearrange_tokens(x, ...); p = aten.view(x_1, [B, S // 4, 4, D])      # p: Sharded(1), one token for each group
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.errors import LengthDependent, NoChunks, where
from cpcompile.ir.annotation import annotate, placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.joining import Joiner, regrouped
from cpcompile.ir.operator_call import JOINS, Call, depends_on_length, expression, value_of
from cpcompile.ir.placement import Full, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.rules.convolution import BY_RANK, CONVOLUTIONS, paddings, spatial
from cpcompile.rules.groups import POOLS, overlap_along, stride_along
from cpcompile.rules.views import locate_tokens, quotient

aten = torch.ops.aten

VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
}
# What models begin with that leaves fewer tokens, or more.
STEMS = {*CONVOLUTIONS, *POOLS, aten.unfold.default, aten.pad.default, aten.constant_pad_nd.default, *JOINS}


class Regrouper:
    """Changes the operands of calls that read tokens in groups."""

    def __init__(self, joiner: Joiner) -> None:
        self.joiner, self.gm = joiner, joiner.gm
        self.unknown: LengthDependent | None = None  # why a stem is not one of tokens, for all lengths

    def regroup(self, node: fx.Node, call: Call) -> bool:
        """Bring tokens in groups to the ranks, for a view that makes a dim of these; tells whether it changed the operand."""
        if call.target not in VIEWS:
            return False
        at = placement_of(call["self"])
        to = self._in_groups(node, call, at) if isinstance(at, Sharded) and self.joiner.can_rearrange(at) else None
        if to is None:
            return False
        node.args, node.kwargs = call.rebound({"self": self.joiner.rearranged(call["self"], to)})
        return True

    def _in_groups(self, node: fx.Node, call: Call, at: Sharded) -> Sharded | None:
        """Return the placement of the operand of a view that makes a dim of groups of tokens, in these groups."""
        shape, target = call.shape("self"), tuple(call.result.shape)
        if Lengths.of(self.gm, at.sequence).parts:
            return None
        length, stride = expression(at.count(Lengths.of(self.gm, at.sequence).value)), expression(at.inner)
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
                to = None if number is None else regrouped(at.with_range(0, 0), number, int(elements))
                if to is not None and locate_tokens(shape, target, to, Lengths.of(self.gm, to.sequence).value):
                    return to
            after *= expression(size)
        return None

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

    def pad_groups(self, node: fx.Node, call: Call) -> bool:
        """Bring tokens in groups to the ranks, for a convolution whose windows overlap; tells whether it did.

        The convolution's own zeros are tokens then, and so are those that make the last group whole.
        """
        at = placement_of(call["input"]) if call.target in CONVOLUTIONS else None
        if not isinstance(at, Sharded) or overlap_along(call, at.dim) is None or at.inner != 1:
            return False
        x, shape, rank = call["input"], call.shape("input"), len(paddings(call))
        i, size = at.dim - (len(shape) - rank), expression(shape[at.dim])
        is_padded_only = at.front <= 0 and at.back <= 0 and self.joiner.can_rearrange(at)
        if not is_padded_only or size != expression(at.count(Lengths.of(self.gm, at.sequence).value)):
            return False
        if not size.is_Integer:
            raise LengthDependent(f"{call.target}: a stride along tokens needs their number.\n\n{where(node)}")
        (front, behind), stride = paddings(call)[i], int(spatial(call, "stride")[i])
        groups = -(-(front + int(size) + behind) // stride)
        back = groups * stride - front - int(size)
        with self.gm.graph.inserting_before(node):
            padded = insert_copy(
                self.gm.graph, aten.alias.default, (x,), x, at.with_range(at.front - front, at.back - back, 0.0)
            )
        annotate(padded, origin="")  # no value of the captured graph has this shape
        padded.meta["val"] = value_of(x).new_empty((*shape[: at.dim], groups * stride, *shape[at.dim + 1 :]))
        to = Sharded(at.dim, stride, sequence=self.joiner.sequence(groups, node))
        others = [(0, 0) if j == i else each for j, each in enumerate(paddings(call))]
        node.target = BY_RANK[rank]
        node.args = (
            self.joiner.rearranged(padded, to),
            call["weight"],
            call["bias"],
            spatial(call, "stride"),
            [before for before, _ in others],
            spatial(call, "dilation"),
            call["groups"],
        )
        node.kwargs = {}
        return True

    def stem(self, node: fx.Node, call: Call, hints: Mapping[str, Sharded]) -> Mapping[str, Sharded]:
        """Return where an operand of a whole call holds tokens, in groups for one that reads them so.

        What makes other tokens of them (an overlapping stride, a pool, a token before the first) is whole, and holds these.
        """
        name, at = next(iter(hints.items()))
        if call.target in VIEWS and not locate_tokens(
            call.shape(name), tuple(call.result.shape), at, Lengths.of(self.gm, at.sequence).value
        ):
            to = self._in_groups(node, call, at)
            if to is None and depends_on_length(node):
                reason = f"{call.target}: groups of tokens need their number.\n\n{where(node)}"
                self.unknown = self.unknown or LengthDependent(reason)
            return {name: to} if to else hints
        if call.target not in STEMS:
            return hints
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

    def number_results(self, node: fx.Node, call: Call, shape: tuple[Any, ...], dim: int) -> None:
        """Make what an operator leaves of the tokens along a dim, or makes of them, a sequence, as far as its length is known."""
        for result in call.results:
            size = result.shape[dim] if result.dim() == len(shape) else shape[dim]
            if str(size) not in (str(shape[dim]), "1"):  # a size that depends on values is not compared
                with contextlib.suppress(NoChunks, LengthDependent):
                    self.joiner.sequence(size, node)

    def _groups(self, call: Call, elements: int, groups: sympy.Expr, node: fx.Node) -> int | None:
        """Return the sequence of the groups: their number is a size of the result, or a factor of one."""
        if groups.is_Integer:
            return self.joiner.sequence(int(groups), node)
        for size in call.result.shape:
            if isinstance(size, torch.SymInt) and sympy.expand(expression(size) - groups) == 0:
                return self.joiner.sequence(size, node)
        return None
