"""Attention over joined or grouped tokens: its sequence is the slots of all ranks, laid end to end.

before  o = cp.attention(q, k, v)            # q, k, v: the tokens of text and image behind one another, on every rank
after   o = cp.attention(q, k, v, key_padding=cp.arranged_positions(...) >= 0)      # over the slots of all ranks

Only an attention that knows no order can be had so; one that does takes its tokens as one sequence, which travel for that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_copy, keep_source
from cpcompile.ir.joining import Joiner
from cpcompile.ir.operator_call import Call, value_of
from cpcompile.ir.placement import FULL, Full, Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.rules.pointwise import is_one

aten, cp = torch.ops.aten, torch.ops.cpcompile


class SlotAttention:
    """Puts attentions over slots in the place of those over joined tokens."""

    def __init__(
        self,
        joiner: Joiner,
        align: Callable[[fx.Node, Call], bool],
        straighten: Callable[[fx.Node, Call], bool],
    ) -> None:
        self.joiner, self.gm, self.align, self.straighten = joiner, joiner.gm, align, straighten

    def attend(self, node: fx.Node, call: Call) -> list[fx.Node] | None:
        """Return an attention over the slots of all ranks that took the place of one over joined or grouped tokens.

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
        attended = self._attend_slots(node, call, at, size)
        with self.gm.graph.inserting_before(node):
            node.replace_all_uses_with(insert_copy(self.gm.graph, aten.alias.default, (attended,), node, at))
        return [attended]

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
        """Insert the attention, with what it knows of each token picked for the slots."""
        joined = self.joiner.in_slots(size, at, node)
        slots = Slots(self.joiner, call, joined)
        is_padded = Lengths.of(self.gm, joined.sequence).is_padded
        changes: dict[str, Any] = {name: slots.relabelled(call[name]) for name in ("q", "k", "v")}
        for name in ("documents", "key_padding"):
            if call[name] is not None:
                changes[name] = slots.picked(self._whole(call[name]), 1)
        if is_padded:
            changes["key_padding"] = slots.without_padding(changes.get("key_padding"))
        if call["mask"] is not None:
            mask = self._whole(call["mask"])
            for dim in (-1, -2):
                if not is_one(value_of(mask).shape[dim]):
                    mask = slots.picked(mask, dim)
            changes["mask"] = mask
        args, kwargs = call.rebound(changes)
        new = slots.insert(call.target, *args, value=slots.of_size(value_of(node), 2))
        new.kwargs = kwargs
        annotate(new, strategy=annotation(node).strategy, site=node.name)
        return new

    def _whole(self, x: fx.Node) -> fx.Node:
        return x if isinstance(placement_of(x), Full) else self.joiner.resharder.gather(x, "a mask of joined tokens")


class Slots:
    """Inserts, before an attention, values that have an element for each slot of all ranks."""

    def __init__(self, joiner: Joiner, call: Call, joined: Sharded) -> None:
        self.joiner, self.call, self.joined, self.graph = joiner, call, joined, joiner.gm.graph
        self.placement = Sharded(2, sequence=joiner.slots(joined.sequence))
        self.lengths = Lengths.of(joiner.gm, self.placement.sequence)

    def insert(self, target: Any, *arguments: Any, value: torch.Tensor, placement: Placement = FULL) -> fx.Node:
        """Insert a call before the attention."""
        with self.graph.inserting_before(self.call.node):
            new = self.graph.call_function(target, arguments)
        keep_source(new, self.call.node)
        new.meta["val"] = value
        annotate(new, placement=placement)
        return new

    def of_size(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return a value like `x` with as many elements along a dim as there are slots."""
        shape = list(x.shape)
        shape[dim] = self.lengths.value
        return x.new_empty(shape)

    def relabelled(self, x: fx.Node) -> fx.Node:
        """Return local queries, keys or values as those of this rank's slots."""
        return self.insert(aten.alias.default, x, value=self.of_size(value_of(x), 2), placement=self.placement)

    @cached_property
    def order(self) -> fx.Node:
        """The place of each slot's token in the joined sequence; -1 where it holds none. Shape: [slots]."""
        axis = self.joiner.plan.layout, self.joiner.plan.world_size
        with self.graph.inserting_before(self.call.node):
            spelled = self.joiner.spelled(self.joined)
        value = value_of(self.call["q"]).new_empty(self.lengths.value, dtype=torch.int64)
        return self.insert(cp.arranged_positions.default, self.call["q"], spelled, *axis, value=value)

    @cached_property
    def source(self) -> fx.Node:
        """The place of each slot's token; the first where it holds none. Shape: [slots]."""
        return self.insert(aten.clamp.default, self.order, 0, value=value_of(self.order))

    def picked(self, x: fx.Node, dim: int) -> fx.Node:
        """Return a whole value with the elements of each slot's token along a dim."""
        dim %= value_of(x).dim()
        return self.insert(aten.index_select.default, x, dim, self.source, value=self.of_size(value_of(x), dim))

    def without_padding(self, key_padding: fx.Node | None) -> fx.Node:
        """Return which keys are attended to, without slots that hold no token. Shape: [B, slots]."""
        of_order = value_of(self.order)
        held = self.insert(aten.ge.Scalar, self.order, 0, value=of_order.new_empty(of_order.shape, dtype=torch.bool))
        row = self.insert(aten.unsqueeze.default, held, 0, value=value_of(held)[None])
        if key_padding is not None:
            value = value_of(key_padding).to(torch.bool)
            return self.insert(aten.logical_and.default, key_padding, row, value=value)
        batch: Any = self.call.shape("q")[0]
        value = value_of(row).expand(batch, self.lengths.value)
        if not isinstance(batch, int):
            with self.graph.inserting_before(self.call.node):
                batch = self.graph.call_function(aten.sym_size.int, (self.call["q"], 0))
        return self.insert(aten.expand.default, row, [batch, self.lengths.total], value=value)
