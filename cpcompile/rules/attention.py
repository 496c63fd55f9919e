"""Attention: the one operator that mixes tokens and stays sharded, because a collective takes its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.annotation import annotation
from cpcompile.call import Call
from cpcompile.placement import FULL, Placement, Sharded
from cpcompile.rules.pointwise import is_one
from cpcompile.rules.registry import REASONS, Decision, no_rule, register

QUERY_TOKENS = Sharded(2)


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Queries, keys and values hold the same local tokens; Ulysses wants a dense mask whole, the others their query rows."""

    notation: str = "[b h m d], [b k m d], [b k m e], mask [b h m n] -> [b h m e]"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        wanted: dict[str, Placement] = dict.fromkeys(("q", "k", "v"), QUERY_TOKENS)
        for name in wanted:
            if operands.get(name, QUERY_TOKENS) != QUERY_TOKENS:
                raise no_rule(call, operands, "attention is sharded along another dim than its tokens", self.notation)
        if not {"q", "k", "v"} <= set(operands):
            raise no_rule(call, operands, "queries and keys do not come from the same sharded tokens", self.notation)
        if call["dropout"]:
            raise no_rule(call, operands, "attention dropout is not supported across ranks: set it to 0", self.notation)
        if call["mask"] is not None:
            rows = Sharded(len(call.shape("mask")) - 2)
            by_rows = annotation(call.node).strategy != "ulysses" and not is_one(call.shape("mask")[rows.dim])
            wanted["mask"] = rows if by_rows else FULL
        wanted.update({name: FULL for name in ("documents", "key_padding") if call[name] is not None})
        return Decision(wanted, (QUERY_TOKENS,))

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return None  # attention over tokens that every rank holds whole stays whole


def why_unrecognised(call: Call) -> str:
    """Return why an attention that `find_attention` left alone cannot be sharded."""
    if call["attn_mask"] is not None:
        return "a score bias that may require gradients cannot be sharded yet: detach it if it is not trained"
    return "this form of attention cannot be sharded yet"


REASONS[torch.ops.aten.scaled_dot_product_attention.default] = why_unrecognised
register(AttentionRule(), torch.ops.cpcompile.attention.default)
