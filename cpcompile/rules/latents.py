"""Latents: the operator that marks a value as needed whole, from which keys and values are computed on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.rules.registry import Decision, register


@dataclass(frozen=True, slots=True)
class WholeRule:
    """The operand is gathered; the result is whole, and nothing after it shards it again."""

    notation: str = "[... s ...] -> [... s ...], whole"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        return Decision({"x": FULL}, (FULL,), gathers=frozenset({"x"}))

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return None


register(WholeRule(), torch.ops.cpcompile.whole_tokens.default)
