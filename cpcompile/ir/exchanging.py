"""Exchanging: the nodes that shard a value along another dim than its tokens, and along its tokens again.

before  h                                      # Sharded(1), [B, S, C]
after   h_1 = cp.exchange_dims(h, 1, S, 2, C, "zig_zag", 2, "cp")             # Sharded(2, sequence 1): all tokens of some channels

Channels that are sharded are one more sequence, so that rules treat them as they treat tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.balance.layout import local_length
from cpcompile.errors import NoRule, where
from cpcompile.ir.annotation import annotation, placement_of
from cpcompile.ir.insertion import insert_copy
from cpcompile.ir.operator_call import value_of
from cpcompile.ir.placement import Placement, Sharded
from cpcompile.ir.plan import Lengths
from cpcompile.ir.resharding import Resharder

cp = torch.ops.cpcompile


class Exchanger:
    """Inserts exchanges; a value is exchanged once for each dim."""

    def __init__(self, resharder: Resharder) -> None:
        self.resharder, self.gm = resharder, resharder.gm
        self.num_sequences = len(Lengths.all_of(self.gm))  # of tokens; those behind are channels
        self._exchanged: dict[tuple[fx.Node, int], fx.Node] = {}

    def is_of_channels(self, at: Placement) -> bool:
        """Tell whether a value is sharded along channels."""
        return isinstance(at, Sharded) and at.sequence >= self.num_sequences

    def exchange(self, node: fx.Node, dim: int) -> fx.Node:
        """Return `node` sharded along `dim`, of which every rank has all elements now."""
        if (node, dim) not in self._exchanged:
            at, to = placement_of(node), Sharded(dim, sequence=self._sequence(value_of(node).shape[dim]))
            assert isinstance(at, Sharded)
            plan, lengths, target = self.resharder.plan, self.resharder.lengths(at), self.resharder.lengths(to)
            axis = plan.layout, plan.world_size, plan.group, lengths.bounds, target.bounds
            arguments = (node, at.dim, lengths.total, dim, target.total, *axis)
            with self.gm.graph.inserting_after(max([node, *Lengths.bounds_of(self.gm)])):
                self._exchanged[node, dim] = insert_copy(self.gm.graph, cp.exchange_dims.default, arguments, node, to)
        return self._exchanged[node, dim]

    def to_tokens(self, node: fx.Node) -> fx.Node:
        """Return a value with what is sharded along channels sharded by tokens again.

        Raises:
            NoRule: none of its dims has as many elements as there are tokens.
        """
        at = annotation(node).placement
        if not isinstance(at, Sharded) or not self.is_of_channels(at):
            return node
        shape = value_of(node).shape
        tokens = [lengths.value for lengths in Lengths.all_of(self.gm)[: self.num_sequences]]
        dims = [d for d, size in enumerate(shape) if d != at.dim and any(is_same(size, n) for n in tokens)]
        if not dims:
            raise NoRule(
                f"{node.target}: its result of {list(shape)} cannot be sharded by tokens again: every rank has all that was "
                f"computed of the tokens, for some of the {shape[at.dim]} channels, and no dim has as many elements as there "
                f"are tokens.\n\n{where(node)}\n\n"
                "Turn it back to tokens first (torch.fft.irfft(..., n=tokens), a slice [:tokens]), or pass strict=False to gather it."
            )
        return self.exchange(node, dims[-1])  # the first one may be the batch

    def _sequence(self, size: Any) -> int:
        """Return the number of the sequence of so many elements: of tokens, if there is one, or of channels."""
        known = Lengths.all_of(self.gm)
        for sequence, lengths in enumerate(known):
            if is_same(lengths.value, size):
                return sequence
        plan = self.resharder.plan
        slots = local_length(size, plan.world_size, plan.layout)
        self.gm.meta["cpcompile_lengths"] = (*known, Lengths(size, size, slots))
        return len(known)


def is_same(size: Any, other: Any) -> bool:
    """Tell whether two sizes are known to be equal."""
    return statically_known_true(size == other)
