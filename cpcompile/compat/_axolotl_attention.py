"""Attention of transformers' models over the tokens of all ranks, as a function of transformers' attention interface."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from cpcompile.balance.token_spans import Segments, Spans
from cpcompile.compat._axolotl_layout import RingAttnFunc, Shards
from cpcompile.compat._axolotl_masks import REMEDY, Mask
from cpcompile.compat._axolotl_state import state
from cpcompile.compat._ring_attention import Options, check, eager
from cpcompile.compat._ring_stripes import exchange, from_stripes
from cpcompile.errors import InputError
from cpcompile.runtime import shared_seed
from cpcompile.runtime.attention import gather, ring
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor

# What models hand on to attention and what says nothing about it: the positions are in the queries by now, documents are those
# of update_ring_attn_params, and the rest is for the loss, the outputs or the cache.
HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "deterministic",
    "labels",
    "layer_idx",
    "max_length_k",
    "max_length_q",
    "num_items_in_batch",
    "output_hidden_states",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "target_dtype",
    "use_cache",
}


@eager
def substitute_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return (attention `[B, tokens, H, Dv]` of this rank's queries over the keys of all ranks, None).

    Args:
        module: the layer.
        query: `[B, H, tokens, D]`, this rank's.
        key, value: `[B, K, tokens, D]`, `[B, K, tokens, Dv]`.
        attention_mask: what `substitute_mask` returned, or None for causal attention.
        dropout: probability of a weight being dropped.
        scaling: factor of the scores; None: `1 / sqrt(D)`.
        sliding_window: how many keys up to the query's own are visible.
        softcap: c turns scores s into `c * tanh(s / c)`.
        is_causal: keys after the query are hidden; None: what the layer says.
        s_aux: sinks, `[H]`.
        others: what models add; refused if it would change the result.
    """
    _refuse(module, query, key, others)
    mask = attention_mask if isinstance(attention_mask, Mask) else _unmasked(module, attention_mask, is_causal)
    if sliding_window and mask.is_causal and mask.window != sliding_window:
        if isinstance(attention_mask, Mask):
            raise InputError(
                f"{_name(module)} has a window of {sliding_window} tokens, its mask one of {mask.window}. {REMEDY}"
            )
        mask = replace(mask, window=sliding_window)
    check(query, key, value, Options(dropout, scaling, mask.is_causal, (-1, -1), None, False, False, state.group))
    place = Place(state.shards(query.shape[2], mask.documents), state.ring(), _stride())
    terms = _terms(query, key, mask, place, dropout, scaling, softcap, s_aux)
    state.num_calls += 1
    if place.shards.function is RingAttnFunc.BATCH_STRIPE:
        way = from_stripes(query.shape[2], place.ring, query.device)
        q, k, v = exchange([query, key, value], way)
        (out,) = exchange([_attend(q, k, v, terms, place)], way.back)
    else:
        out = _attend(query, key, value, terms, place)
    return out.transpose(1, 2).contiguous(), None


def _name(module: torch.nn.Module) -> str:
    index = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if index is None else f" of layer {index}")


def _stride() -> int | None:
    return state.heads_k_stride if state.function is RingAttnFunc.VARLEN_LLAMA3 else None


def _refuse(module: torch.nn.Module, query: Tensor, key: Tensor, others: dict[str, Any]) -> None:
    if others.pop("output_attentions", False):
        raise InputError(f"{_name(module)}: attention weights are not kept: call the model without output_attentions.")
    unknown = [name for name, x in others.items() if name not in HARMLESS and x is not None and x is not False]
    if unknown:
        raise InputError(
            f"{_name(module)} attends with {', '.join(sorted(unknown))}, which is not understood. {REMEDY}"
        )
    if query.shape[2] != key.shape[2]:
        raise InputError(
            f"{_name(module)}: {query.shape[2]} queries and {key.shape[2]} keys: call the model with use_cache=False. "
            "Attention to other tokens than the sequence's own cannot be shared by the ranks."
        )


def _unmasked(module: torch.nn.Module, attention_mask: Tensor | None, is_causal: bool | None) -> Mask:
    """Return what a layer without a mask sees."""
    if attention_mask is not None:
        raise InputError(
            f"{_name(module)} has a mask {list(getattr(attention_mask, 'shape', ()))} that transformers' mask functions did not "
            f"make: pass attention_mask [batch, tokens] or none to the model. {REMEDY}"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal:
        raise InputError(
            f"{_name(module)} attends to all tokens, without a mask: nothing says that they are the sequence's. {REMEDY}"
        )
    return Mask(is_causal=True, documents=state.documents)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens are, and how many heads of k are gathered at once; None: keys go round the ring."""

    shards: Shards
    ring: Ring
    heads_per_message: int | None

    @property
    def spans(self) -> tuple[Spans, ...]:
        """The tokens of each rank."""
        return self.shards.spans


def _terms(
    q: Tensor,
    k: Tensor,
    mask: Mask,
    place: Place,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionArguments:
    """Return what the runtime computes; for dropout the ranks agree on a seed."""
    if sinks is not None and sinks.numel() != q.shape[1]:
        raise InputError(f"s_aux is {list(sinks.shape)}: pass one sink a head, [{q.shape[1]}].")
    length = place.shards.length
    known = {
        "mask": None,
        "documents": None,
        "key_padding": mask.padding,
        "scale": q.shape[3] ** -0.5 if scaling is None else scaling,
        "is_causal": mask.is_causal,
        "window": mask.window,
        "softcap": softcap or 0.0,
        "dropout": dropout,
        "lookahead": mask.lookahead,
        "bounds": None,
        "prefix": None,
        "slopes": None,
        "sinks": None if sinks is None else sinks.reshape(-1),
        "seed": shared_seed(q.device, place.ring.size, place.ring.group) if dropout else None,
    }
    terms = AttentionArguments.of(q, k, tuple(known.values()), length)
    rows = mask.documents.rows(mask.chunk, length)
    if rows is None:
        return terms
    if len(rows) not in (1, q.shape[0]):
        raise InputError(
            f"documents of {len(rows)} rows, but the batch has {q.shape[0]}: call update_ring_attn_params(position_ids) "
            "with those of this batch before the model."
        )
    return replace(terms, visible=replace(terms.visible, segments=Segments.of(rows)))


def _attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, place: Place) -> Tensor:
    out: Tensor = _Attend.apply(q, k, v, terms.sinks, terms, place)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    """(q, k, v, sinks) -> out."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, terms: AttentionArguments, place: Place
    ) -> Tensor:
        if place.heads_per_message is None:
            out, lse = ring.attend(q, k, v, terms, place.spans, place.ring)
        else:
            out, lse = gather.attend(q, k, v, terms, place.spans, place.ring, place.heads_per_message)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.terms, ctx.place = replace(terms, sinks=None), place
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        place: Place = ctx.place
        q, k, v, out, lse, sinks = ctx.saved_tensors
        arguments = (dout, q, k, v, out, lse, replace(ctx.terms, sinks=sinks), place.spans, place.ring)
        if place.heads_per_message is None:
            grads = ring.attend_backward(*arguments)
        else:
            grads = gather.attend_backward(*arguments, place.heads_per_message)
        return *grads, None, None
