"""Attention: the one operator that mixes tokens and stays sharded, because a collective takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules.pointwise import is_one
from cpcompile.rules.registry import Decision, no_rule, register
from cpcompile.runtime.attention.catalogue import STRATEGIES, Strategy

QUERY_TOKENS = Sharded(2)

# Of the whole sequence, of sequences or of heads: every rank reads all of them.
WHOLE = ("documents", "key_padding", "bounds", "prefix", "slopes", "sinks", "seed")


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """Queries, keys and values hold the same local tokens; Ulysses wants a dense mask whole, the others their query rows.

    Keys and values of another sequence, or of a memory that is not sharded, are made whole on every rank, and each
    rank attends from its own queries, so that the operator stays what it is.
    """

    notation: str = "[b h m d], [b k m d], [b k m e], mask [b h m n] -> [b h m e]"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        given = {name: operands[name] for name in ("q", "k", "v") if name in operands}
        if any(
            at.with_range(0, 0) != replace(QUERY_TOKENS, sequence=at.sequence) or not at.covers_all
            for at in given.values()
        ):
            raise no_rule(call, operands, "attention is sharded along another dim than its tokens", self.notation)
        sizes = {str(call.shape(name)[2]) for name in ("q", "k", "v")}
        if len(sizes) == 1 and len({at.sequence for at in given.values()}) == 1:
            return self._along_one_sequence(call, next(iter(given.values())), given.keys(), "mask" in operands)
        return self._across(call, operands)

    def _along_one_sequence(self, call: Call, at: Sharded, given: Set[str], is_sharded: bool) -> Decision:
        strategy = STRATEGIES.get(annotation(call.node).strategy, Strategy())
        # Keys and values of a latent that was gathered are whole already.
        is_expanded = strategy.is_latent and given == {"q"}
        keys: Placement = FULL if is_expanded else at
        wanted: dict[str, Placement] = {"q": at, "k": keys, "v": keys}
        vectors = {name for name in WHOLE if call[name] is not None}
        if call["mask"] is not None:
            rows = replace(at, dim=len(call.shape("mask")) - 2)
            by_rows = is_sharded or not strategy.takes_whole_mask
            if is_one(call.shape("mask")[rows.dim]):
                vectors.add("mask")
            else:
                wanted["mask"] = rows if by_rows else FULL
        wanted.update(dict.fromkeys(vectors, FULL))
        return Decision(wanted, (at,), gathers=frozenset(vectors))

    def _across(self, call: Call, operands: Mapping[str, Sharded]) -> Decision:
        has_places = call["is_causal"] or call["window"] or call["lookahead"] >= 0
        if has_places or any(call[name] is not None for name in ("documents", "prefix", "slopes")):
            raise no_rule(call, operands, "queries and keys of different tokens have no common order", self.notation)
        assert not call["dropout"], "queries that are no square with their keys drop their weights written out"
        wanted: dict[str, Placement] = {name: FULL for name, _ in call.operands()}
        result: Placement = FULL
        if "q" in operands:
            wanted["q"] = result = operands["q"]
            if call["mask"] is not None:
                rows = replace(operands["q"], dim=len(call.shape("mask")) - 2)
                wanted["mask"] = FULL if is_one(call.shape("mask")[rows.dim]) else rows
        return Decision(wanted, (result,), gathers=frozenset({"k", "v"}))

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return None  # attention over tokens that every rank holds whole stays whole


register(AttentionRule(), torch.ops.cpcompile.attention.default)
