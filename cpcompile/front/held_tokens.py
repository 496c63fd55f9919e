"""Held tokens: of values of a rank, the tokens that it holds; the slots behind them mean nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.balance.arrangement import Arrangement
from cpcompile.balance.token_order import TokenOrder
from cpcompile.compile.transform import Transformed
from cpcompile.inspect.definitions.slices import factors
from cpcompile.inspect.model_runs import sequence_lengths, token_orders
from cpcompile.ir.annotation import annotation
from cpcompile.ir.placement import Sharded

Tensor = torch.Tensor


class HeldTokens:
    """Takes, of the values of one run, what means something. `bounds` are those of all documents once a value is sharded."""

    def __init__(
        self, transformed: Transformed, rank: int, given: Sequence[Any], bounds: Mapping[fx.Node, Tensor]
    ) -> None:
        self._transformed, self._rank, self._given, self._bounds = transformed, rank, given, bounds
        self._orders: list[TokenOrder | Arrangement] = []

    def of(self, node: fx.Node) -> Callable[[Tensor], Tensor]:
        """Return what takes, of a value like that of `node`, the tokens of this rank."""
        at = annotation(node).placement
        if not isinstance(at, Sharded):
            return lambda x: x
        if not self._orders:
            lengths = sequence_lengths(self._transformed, self._given)
            self._orders = token_orders(self._transformed.graph, self._transformed.plan, lengths, self._bounds)
        order = self._orders[at.sequence]
        if at.reaches_outside:
            return lambda x: x[:0]  # it holds what is not known
        if not isinstance(order, TokenOrder):
            return lambda x: x
        count = order.num_held(self._rank)
        return lambda x: factors(x, at, order.local_length).narrow(at.dim + 1, 0, count)
