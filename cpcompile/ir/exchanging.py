"""Exchanging: the nodes that shard a value along another dim than its tokens, and along its tokens again.

before  h                                      # Sharded(1), [B, S, C]
after   h_1 = cp.exchange_dims(h, 1, S, 2, C, "zig_zag", 2, "cp")         # Sharded(2, sequence 1): all tokens of some channels

Channels that are sharded are one more sequence, so that rules treat them as they treat tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.balance.layout import local_length
from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.operator_call import value_of
from cpcompile.ir.placement import CHANNELS, FULL, Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.ir.resharding import Resharder

cp = torch.ops.cpcompile


class Exchanger:
    """Inserts exchanges; a value is sharded once along each dim."""

    def __init__(self, resharder: Resharder) -> None:
        self.resharder, self.gm = resharder, resharder.gm
        self._exchanged: dict[tuple[fx.Node, Sharded], fx.Node] = {}

    def is_of_channels(self, at: Placement | tuple[Placement, ...]) -> bool:
        """Tell whether a value is sharded along channels."""
        return isinstance(at, Sharded) and (at.sequence == CHANNELS or Lengths.of(self.gm, at.sequence).is_of_channels)

    def exchange(self, node: fx.Node, to: Sharded) -> fx.Node:
        """Return `node` sharded along another dim, of which every rank has all elements now.

        Raises:
            NoRule: the tokens are not dealt as those of one sequence.
        """
        if to.sequence == CHANNELS:
            to = replace(to, sequence=self._channels(value_of(node).shape[to.dim]))
        if (node, to) not in self._exchanged:
            at = placement_of(node)
            assert isinstance(at, Sharded) and not (at.inner - 1 or to.inner - 1) and at.covers_all and to.covers_all
            plan, lengths, target = self.resharder.plan, self.resharder.lengths(at), self.resharder.lengths(to)
            if not all(x.is_of_tokens or x.is_of_channels for x in (lengths, target)):
                raise NoRule(
                    f"{node.target}: its result is needed with its tokens dealt as one sequence, by the layout {plan.layout}."
                    f"\n\n{where(node)}\n\nUse balancer='zig_zag' or 'contiguous'."
                )
            axis = plan.layout, plan.world_size, plan.group, lengths.bounds, target.bounds
            arguments = (node, at.dim, lengths.total, to.dim, target.total, *axis)
            with self.gm.graph.inserting_after(max([node, *Lengths.bounds_of(self.gm)])):
                self._exchanged[node, to] = insert_copy(self.gm.graph, cp.exchange_dims.default, arguments, node, to)
        return self._exchanged[node, to]

    def gather(self, node: fx.Node, reason: str) -> fx.Node:
        """Return all channels of a value that is sharded along them and has no dim of tokens; `reason` says what needs it."""
        whole = self.resharder.gather(node, reason)
        annotate(whole, placement=FULL)
        return whole

    def to_tokens(self, node: fx.Node) -> fx.Node:
        """Return a value with what is sharded along channels sharded by tokens again.

        Raises:
            NoRule: none of its dims has as many elements as there are tokens.
        """
        at = annotation(node).placement
        if not isinstance(at, Sharded) or not self.is_of_channels(at):
            return node
        shape = value_of(node).shape
        tokens = [(number, x) for number, x in enumerate(Lengths.all_of(self.gm)) if x.is_of_tokens]
        found = [
            Sharded(dim, sequence=sequence)
            for sequence, lengths in tokens
            for dim, size in enumerate(shape)
            if dim != at.dim
            and at.inner == 1
            and shape[at.dim] == self.resharder.lengths(at).value
            and statically_known_true(size == lengths.value)
        ]
        if not found:
            raise NoRule(
                f"{node.target}: its result of {list(shape)} cannot be sharded by tokens again: every rank has all that was "
                f"computed of the tokens, for some of the {shape[at.dim]} channels, and no dim has as many elements as there "
                f"are tokens.\n\n{where(node)}\n\n"
                "Turn it back to tokens first (torch.fft.irfft(..., n=tokens), a slice [:tokens]), or pass strict=False to "
                "gather it."
            )
        return self.exchange(node, next((to for to in found if to.dim), found[0]))  # the first dim may be the batch

    def _channels(self, size: int) -> int:
        """Return the number of the sequence of so many channels."""
        known = Lengths.find(self.gm, size, lambda x: x.is_of_channels)
        if known is not None:
            return known
        slots = local_length(size, self.resharder.plan.world_size, self.resharder.plan.layout)
        return Lengths(size, size, slots, is_of_channels=True).add(self.gm)
