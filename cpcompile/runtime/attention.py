"""Attention on one device: the canonical operator that every form of attention is rewritten to before it is distributed."""

from __future__ import annotations

import torch

from cpcompile.runtime.block import Gradients, Result, Terms, empty_result
from cpcompile.runtime.differentiate import differentiate
from cpcompile.runtime.kernel_math import grouped, scores
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.schedule import Piece, whole

Tensor = torch.Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of whole sequences, in the user's order."""
    result = Result(q, v)
    result.add(q, k, v, whole(q.shape[2]), whole(k.shape[2]), terms)
    return result.finish()


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: Terms
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of whole sequences, in the user's order."""
    grads = Gradients.empty(q, k, v)
    grads.add(dout, q, k, v, out, lse, whole(q.shape[2]), whole(k.shape[2]), terms)
    return grads.dq.to(q.dtype), grads.dk.to(k.dtype), grads.dv.to(v.dtype)


@torch.library.custom_op("cpcompile::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse); see `attention`."""
    return attend(q, k, v, Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap))


@attention_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    return empty_result(q, v)


@torch.library.custom_op("cpcompile::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (dq, dk, dv) of `attention_forward`."""
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    return attend_backward(dout, q, k, v, out, lse, terms)


@attention_backward.register_fake
def _(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


differentiate(attention_forward, attention_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    documents: Tensor | None,
    key_padding: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    dropout: float,
) -> Tensor:
    """Return attention `[B, H, Sq, Dv]` of q `[B, H, Sq, D]`, k `[B, K, Skv, D]`, v `[B, K, Skv, Dv]`; H is a multiple of K.

    A key is visible where all of these agree: `mask` (bool, True attends; a float mask is added instead, after `softcap`),
    `documents` `[B|1, S]` equal at query and key, `key_padding` `[B|1, Skv]` True, `is_causal` kv <= q, `window` > 0
    q - kv < window. A row that sees no key gives 0. `softcap` > 0 turns scores s into softcap * tanh(s / softcap).
    """
    terms = Terms.of(mask, documents, key_padding, scale, is_causal, window, softcap)
    if dropout == 0:
        return attention_forward(q, k, v, mask, documents, key_padding, scale, is_causal, window, softcap)[0]  # type: ignore[no-any-return]
    return dropped(q, k, v, terms, dropout)


def dropped(q: Tensor, k: Tensor, v: Tensor, terms: Terms, dropout: float) -> Tensor:
    """Return attention with dropout, in plain ATen: the compiler then owns the random numbers of forward and backward."""
    s = visible_scores(q, k, terms)
    p = torch.softmax(s, -1).masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0)
    p = torch.nn.functional.dropout(p, dropout)
    return (p @ v.to(p.dtype).unsqueeze(2)).flatten(1, 2).to(q.dtype)


def visible_scores(q: Tensor, k: Tensor, terms: Terms) -> Tensor:
    """Return the masked scores `[B, K, G, Sq, Skv]`."""
    rows, columns = whole(q.shape[2])[0], whole(k.shape[2])[0]
    mask = terms.mask_of(Piece(rows, columns, is_masked=True), q.device)
    k_BKSD = k.to(accumulation_dtype(k.dtype))
    return scores(grouped(q, k.shape[1]), k_BKSD, mask, terms.scale, False, terms.softcap)[0]


# Composite: it differentiates and compiles as what it calls, and survives in graphs traced before dispatch.
torch.library.define(
    "cpcompile::attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? documents, Tensor? key_padding, float scale, "
    "bool is_causal, SymInt window, float softcap, float dropout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("cpcompile::attention", "CompositeImplicitAutograd")(attention)
