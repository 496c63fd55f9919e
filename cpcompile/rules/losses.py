"""Losses of pairs of elements: local without a reduction, and else a partial sum over the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import PARTIAL, Sharded
from cpcompile.rules.over_tokens import masked, whole_count
from cpcompile.rules.pointwise import aligned
from cpcompile.rules.registry import Decision, IndexedRule, Indices, Lowering, no_rule, register

aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # at::Reduction


def broadcast(call: Call) -> tuple[Any, ...]:
    """Return the shape of the losses before they are reduced."""
    shapes = (call.shape(name) for name, _ in call.operands())
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def pairs(call: Call) -> Indices:
    """[...], [...] -> [...] with broadcasting, or [], a partial sum"""
    shape = broadcast(call)
    names = tuple(f"d{i}" for i in range(len(shape)))
    is_reduced = call["reduction"] != _NONE
    unequal = [n for n, _ in call.operands() if n not in ("weight", "pos_weight") and call.shape(n) != shape]
    if is_reduced and unequal:  # torch scales gradients of such a mean by the number of elements of one operand
        raise no_rule(call, {}, f"{', '.join(unequal)} would be broadcast to {list(shape)}; expand it first")
    operands = {name: aligned(call.shape(name), shape) for name, _ in call.operands()}
    return Indices(operands, (() if is_reduced else names,), summed=True)


BY_NAMES = IndexedRule(pairs, str(pairs.__doc__))


@dataclass(frozen=True, slots=True)
class LossRule:
    """The losses of the tokens are computed one by one, and those of tokens are added up; a mean divides by all of them."""

    notation: str = BY_NAMES.notation

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        decision = BY_NAMES.push(call, operands, length)
        if decision.results != (PARTIAL,):
            return decision
        name, at = next((name, at) for name, at in decision.operands.items() if isinstance(at, Sharded))
        rank = len(broadcast(call))
        at = replace(at, dim=at.dim + rank - len(call.shape(name)))

        def lower(writer: Lowering) -> Sequence[fx.Node]:
            args, kwargs = writer.call.rebound({"reduction": _NONE})
            losses = writer.insert(call.target, *args, **kwargs)
            total = writer.insert(aten.sum.default, masked(writer, at, losses, 0))
            if call["reduction"] == _MEAN:
                total = writer.insert(aten.div.Tensor, total, whole_count(writer, at, losses, range(rank)))
            return [total]

        return replace(decision, padding={}, lower=lower)

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return BY_NAMES.pull(call, result, length)


register(
    LossRule(),
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.hinge_embedding_loss.default,
    aten.huber_loss.default,
    aten.kl_div.default,
    aten.l1_loss.default,
    aten.margin_ranking_loss.default,
    aten.mse_loss.default,
    aten.poisson_nll_loss.default,
    aten.smooth_l1_loss.default,
    aten.soft_margin_loss.default,
)
