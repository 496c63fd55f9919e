"""Channels: an operator that mixes all tokens, and knows nothing of other dims, runs over all tokens for some channels."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.rules.along_tokens import ExtendedRule
from cpcompile.rules.dims import closed, own
from cpcompile.rules.ranges import SliceRule
from cpcompile.rules.registry import RULES, IndexedRule, Indices, along_channels


def channels_of(call: Call, operands: Mapping[str, Sharded]) -> Mapping[str, Sharded]:
    """Return how all sharded operands can be sharded along one dim that the operator does not mix; {} if there is none."""
    if torch.Tag.nondeterministic_seeded in call.target.tags:
        return {}  # a rank would draw other numbers
    base = RULES.get(call.target)
    while isinstance(base, ExtendedRule):
        base = base.base
    if isinstance(base, IndexedRule):
        return along_channels(call, base.indices(call), operands)
    if isinstance(base, SliceRule):
        names = closed(own(call), call.dim("dim", "self"))
        return along_channels(call, Indices({"self": names}, (names,)), operands)
    return {}
