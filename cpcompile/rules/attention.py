"""Attention: the one operator that mixes tokens and stays sharded, because a collective takes its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.balance.layout import follows_documents
from cpcompile.errors import NoChunks, where
from cpcompile.ir.annotation import annotate, annotation
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Placement, Sharded
from cpcompile.rules.along_tokens import before_end
from cpcompile.rules.over_tokens import all_reduce, cast, counted, widened
from cpcompile.rules.pointwise import is_one
from cpcompile.rules.registry import Decision, Lowering, no_rule, register
from cpcompile.runtime.attention.catalogue import STRATEGIES, Strategy

aten = torch.ops.aten
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
        if "q" in given and len(set(given.values())) == 1 and given["q"].dim < 2:
            return self._of_rows(call, given["q"], operands)
        if any(at.reaches_outside for at in given.values()):
            raise no_rule(call, operands, "attention reads tokens outside the sequence", self.notation)
        sizes = {str(call.shape(name)[2]) for name in ("q", "k", "v")}
        if len(sizes) > 1 or len({at.sequence for at in given.values()}) != 1:
            if "q" in given and given["q"].dim != QUERY_TOKENS.dim:
                raise no_rule(call, operands, "queries hold the tokens along another dim than their own", self.notation)
            return self._across(call, operands)
        if len(given) == 3 and set(given.values()) == {replace(given["q"], dim=3)} and is_plain(call):
            return self._of_features(given["q"])
        if any(at.with_range(0, 0) != replace(QUERY_TOKENS, sequence=at.sequence) for at in given.values()):
            raise no_rule(call, operands, "attention is sharded along another dim than its tokens", self.notation)
        if not all(at.covers_all for at in given.values()):
            return self._along_a_range(call, next(iter(given.values())), operands)
        return self._along_one_sequence(call, next(iter(given.values())), given.keys(), "mask" in operands)

    def _of_rows(self, call: Call, at: Sharded, operands: Mapping[str, Sharded]) -> Decision:
        """Attend along another dim than that of the tokens, which are rows of the batch or heads: each rank has its own."""
        if call["dropout"] or call["bounds"] is not None or call.shape("q")[1] != call.shape("k")[1]:
            raise no_rule(call, operands, "attention is sharded along another dim than its tokens", self.notation)
        result = replace(at, outside=None)
        dims = {"documents": 0, "key_padding": 0, "prefix": 0, "slopes": 1, "sinks": 1}
        terms = [name for name in ("mask", *dims) if call[name] is not None]
        wanted: dict[str, Placement] = {**dict.fromkeys(("q", "k", "v"), at), **dict.fromkeys(terms, FULL)}
        for name in terms:
            own = at.dim + len(call.shape("mask")) - 4 if name == "mask" else 0 if dims[name] == at.dim else -1
            if own >= 0 and not is_one(call.shape(name)[own]):
                wanted[name] = replace(at, dim=own)
        return Decision(wanted, (result,), gathers=frozenset(terms))

    def _of_features(self, at: Sharded) -> Decision:
        """Attend from channels to channels, of which the tokens are the features: the ranks add up the scores of their own."""

        def lower(writer: Lowering) -> Sequence[fx.Node]:
            q, k, v = (writer.call[name] for name in ("q", "k", "v"))
            scores = writer.insert(aten.matmul.default, q, writer.insert(aten.transpose.int, k, 2, 3))
            scores = all_reduce(writer, widened(writer, scores))
            weights = writer.insert(aten.softmax.int, writer.insert(aten.mul.Scalar, scores, writer.call["scale"]), -1)
            return [writer.insert(aten.matmul.default, cast(writer, weights, v.meta["val"].dtype), v)]

        return Decision(dict.fromkeys(("q", "k", "v"), at), (at,), padding={"q": 0.0}, lower=lower)

    def _along_a_range(self, call: Call, at: Sharded, operands: Mapping[str, Sharded]) -> Decision:
        """Move the tokens to the front of the sequence, and hide the slots that are left over at its end."""
        known, num_over = annotation(call.node), at.front + at.back
        if STRATEGIES.get(known.strategy, Strategy()).is_latent:
            raise no_rule(call, operands, "keys of a latent are of all tokens, not of a range", self.notation)
        wanted = self._along_one_sequence(call, at.with_range(0, num_over), operands.keys(), "mask" in operands)

        def lower(writer: Lowering) -> Sequence[fx.Node]:
            if follows_documents(str(writer.axis[0])):
                raise NoChunks(
                    f"attention to a range of the tokens cannot follow documents.\n\n{where(call.node)}\n\n"
                    "Use balancer='zig_zag' or 'contiguous'."
                )
            new = writer.insert(call.target, *writer.call.rebound(hidden_end(writer, wanted, num_over))[0])
            annotate(new, strategy=known.strategy)
            return [new]

        return replace(wanted, lower=lower)

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


def is_plain(call: Call) -> bool:
    """Tell whether every query sees every key as it is, and has heads of its own."""
    terms = ("mask", *WHOLE, "is_causal", "window", "softcap", "dropout")
    same_heads = str(call.shape("q")[1]) == str(call.shape("k")[1])
    return same_heads and call["lookahead"] < 0 and all(call[name] in (None, False, 0) for name in terms)


def hidden_end(writer: Lowering, decision: Decision, num_over: int) -> dict[str, fx.Node]:
    """Return the arguments of an attention to all slots of which it shall not see the last `num_over`."""
    call = writer.call
    terms = {}
    for name, filler in (("documents", -1), ("key_padding", 0)):  # -1: a document of their own
        if call[name] is not None:
            terms[name] = writer.insert(aten.constant_pad_nd.default, call[name], [0, num_over], filler)
    if call["mask"] is not None and not is_one(call.shape("mask")[-1]):
        nothing, everything = (0.0, 1.0) if call.tensor("mask").dtype == torch.bool else (-torch.inf, 0.0)
        mask = writer.insert(aten.constant_pad_nd.default, call["mask"], [0, num_over], nothing)
        if not isinstance(decision.operands["mask"], Sharded) and not is_one(call.shape("mask")[-2]):
            # Rows that nobody reads see something: softmax has no gradient where nothing is seen.
            mask = writer.insert(aten.constant_pad_nd.default, mask, [0, 0, 0, num_over], everything)
        terms["mask"] = mask
    if not terms and not (call["is_causal"] and call["prefix"] is None):
        terms["key_padding"] = visible(writer, num_over)
    return terms


def visible(writer: Lowering, num_over: int) -> fx.Node:
    """Return which keys are in a range that leaves out the last tokens, `[B, S]`."""
    place = counted(writer, writer.call["q"], writer.length)
    is_inside = writer.insert(aten.lt.Scalar, place, before_end(writer, num_over))
    batch = writer.call.shape("q")[0]
    size = batch if isinstance(batch, int) else writer.insert(aten.sym_size.int, writer.call["q"], 0)
    return writer.insert(
        aten.expand.default, writer.insert(aten.unsqueeze.default, is_inside, 0), [size, writer.length]
    )


register(AttentionRule(), torch.ops.cpcompile.attention.default)
