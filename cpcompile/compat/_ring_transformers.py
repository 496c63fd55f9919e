"""Attention of transformers' models by `llama3_flash_attn_varlen_func`, for models that are called with this rank's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from cpcompile.compat._ring_attention import Options, Place, attend, eager
from cpcompile.compat._ring_layouts import contiguous, starts_of_all
from cpcompile.errors import ConfigError, InputError

Tensor = torch.Tensor
NAMES = ("flash_attention_2", "ring_attn")  # where flash-attn is not installed, the second one loads: it has no "flash"


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of a step, as one rank knows them: see `starts_of_all`."""

    cu_seqlens_q: Tensor
    local_k_slice: slice


current: dict[str, Documents] = {}  # by the name of the group


def substitute(process_group: ProcessGroup, heads_k_stride: int) -> None:
    """Register the attention function under `NAMES`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    @eager
    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        documents = current.get(process_group.group_name)
        if documents is None:
            raise ConfigError(
                "no documents are known: call update_ring_flash_attn_params(cu_seqlens, group) before the model."
            )
        _refuse(query, key, attention_mask, softcap, s_aux)
        causal = bool(module.is_causal) if is_causal is None else is_causal
        window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
        options = Options(dropout, scaling, causal, window, None, False, False, process_group)
        ring, size = options.ring(), query.shape[2]
        starts = starts_of_all(documents.cu_seqlens_q, documents.local_k_slice, size, ring)
        out, _ = attend(query, key, value, options, Place(contiguous(size, ring.size), ring, starts, heads_k_stride))
        return out.transpose(1, 2), None

    for name in NAMES:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, flash_attention_mask)


def _refuse(query: Tensor, key: Tensor, mask: Tensor | None, softcap: float | None, sinks: Tensor | None) -> None:
    """Refuse what the function does not compute."""
    remedy = "use cpcompile.apply(model, mesh), which computes it"
    if softcap or sinks is not None:
        raise InputError(
            f"the model caps its scores or has attention sinks, which this function does not take: {remedy}."
        )
    if query.shape[0] != 1 or mask is not None:
        raise InputError(
            f"the batch has {query.shape[0]} rows{' and padding' if mask is not None else ''}: pack the documents into one row "
            f"without padding and pass where they begin to update_ring_flash_attn_params, or {remedy}."
        )
    if query.shape[2] != key.shape[2]:
        raise InputError(f"{query.shape[2]} queries and {key.shape[2]} keys: call the model with use_cache=False.")
