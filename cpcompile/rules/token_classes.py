"""Losses whose classes are the tokens: where in the text an answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules import reduction  # noqa: F401  (the rules that are extended here)
from cpcompile.rules.along_tokens import along_tokens, holds_tokens_only
from cpcompile.rules.registry import Decision

aten = torch.ops.aten


@along_tokens(aten.cross_entropy_loss.default, aten.nll_loss_nd.default, aten.nll_loss.default)
def loss_of_places(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """every rank gets the scores, one number for each token, and computes the whole loss"""
    at, rank = operands.get("self"), len(call.shape("self"))
    if at is None or len(operands) > 1 or rank > 2 or at.dim != rank - 1:
        return None
    if not holds_tokens_only(call, "self", at, length):
        return None
    wanted = {name: FULL for name, _ in call.operands()}
    return Decision(wanted, (FULL,), gathers=frozenset({"self"}))
