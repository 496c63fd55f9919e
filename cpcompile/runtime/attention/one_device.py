"""Attention on one device: the canonical operator that every form of attention is rewritten to before it is distributed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cpcompile.runtime.attention import registration
from cpcompile.runtime.attention.arguments import SCHEMA, AttentionArguments
from cpcompile.runtime.attention.partial_results import Gradient, Result, add_gradients, empty_result
from cpcompile.runtime.attention.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.kernels import math
from cpcompile.runtime.kernels.lanes import Lanes
from cpcompile.runtime.kernels.merge import accumulation_dtype
from cpcompile.runtime.schedule import Piece, whole

Tensor = torch.Tensor


def _terms(q: Tensor, k: Tensor, values: tuple[Any, ...]) -> AttentionArguments:
    return AttentionArguments.of(q, k, values, length=max(q.shape[2], k.shape[2]))


def attend(q: Tensor, k: Tensor, v: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of whole sequences, in the user's order."""
    terms = _terms(q, k, values)
    pieces = terms.pieces(whole(q.shape[2]), whole(k.shape[2]))
    result = Result(q, v, 1, len(pieces))
    result.add(q, k, v, pieces, terms)
    return with_sinks(*result.finish(), terms.sinks)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: list[Tensor], *values: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks) of whole sequences, in the user's order."""
    terms, (dq, dk, dv) = _terms(q, k, values), (Gradient(x, num_blocks=1) for x in (q, k, v))
    pieces = terms.pieces(whole(q.shape[2]), whole(k.shape[2]))
    lanes = Lanes(q.device, len(pieces))
    add_gradients(dq, dk, dv, (dout, q, k, v, out, lse), pieces, terms, lanes)
    lanes.flush()
    return dq.finish(), dk.finish(), dv.finish(), sinks_gradient(dout, out, lse, terms.sinks)


registration.define(
    "attention_forward",
    attend,
    attend_backward,
    results=lambda q, k, v, *values: empty_result(q, v),
)


def attention(q: Tensor, k: Tensor, v: Tensor, *values: Any, layer: str = "") -> Tensor:
    """Return attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]`, k `[B, K, Skv, D]`, v `[B, K, Skv, Dv]`; H is a multiple of K.

    What hides keys and changes scores: see `AttentionArguments`. Dropout without a seed draws as torch does.
    """
    terms = _terms(q, k, values)
    if terms.dropout == 0 or terms.seed is not None:
        return torch.ops.cpcompile.attention_forward(q, k, v, *values, layer=layer)[0]  # type: ignore[no-any-return]
    return dropped(q, k, v, terms)


def dropped(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments) -> Tensor:
    """Return attention with dropout, in plain ATen: the compiler then owns the random numbers of forward and backward."""
    (rows,), (columns,), band = whole(q.shape[2]), whole(k.shape[2]), terms.visible.band
    block = replace(terms, dropout=0.0).block(Piece(rows, columns, band.low, band.high), q.device)
    s = math.scores(math.grouped(q, k.shape[1]), k.to(accumulation_dtype(k.dtype)), block)[0]
    p = torch.softmax(s, -1).masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0)
    p = torch.nn.functional.dropout(p, terms.dropout)
    return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype)


# Composite: it differentiates and compiles as what it calls, and survives in graphs traced before dispatch.
torch.library.define(
    "cpcompile::attention",
    f"(Tensor q, Tensor k, Tensor v, {SCHEMA}, *, {registration.LAYER_SCHEMA}) -> Tensor",
    tags=registration.TAGS,
)
torch.library.impl("cpcompile::attention", "CompositeImplicitAutograd")(attention)
