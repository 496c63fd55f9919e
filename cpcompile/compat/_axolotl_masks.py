"""Masks of transformers' models, understood rather than made: what is visible, for attention over the tokens of all ranks.

A model makes its masks once, of this rank's tokens. Here the mask function is read instead, and what it says goes to the
layers in place of a mask. Layers that run again in backward (activation checkpointing) are given the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile.compat._axolotl_layout import Shards
from cpcompile.compat._axolotl_state import ONE_DOCUMENT, Documents, state
from cpcompile.errors import InputError
from cpcompile.runtime.transport import process_group

Tensor = torch.Tensor
REMEDY = "Use cpcompile.apply(model, mesh), which transforms the model's own masks."


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """What a layer sees, in place of a mask.

    Attributes:
        is_causal: keys after the query are hidden.
        window: W > 0: q - kv < W.
        lookahead: A >= 0: kv - q <= A.
        chunk: C > 0: within the same C tokens of the document.
        padding: bool `[B, length]`, True where visible.
        documents: that see themselves only.
    """

    is_causal: bool = False
    window: int = 0
    lookahead: int = -1
    chunk: int = 0
    padding: Tensor | None = None
    documents: Documents = ONE_DOCUMENT


def substitute_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Mask:
    """Return what a model's mask says; in the place of transformers' functions that make one."""
    from transformers.masking_utils import causal_mask_function

    if q_length != kv_length or int(q_offset) or kv_offset:
        raise InputError(f"{q_length} queries and {kv_length} keys: call the model with use_cache=False.")
    read = Reading(mask_function or causal_mask_function)
    documents = state.documents
    shards = state.shards(q_length, documents)
    if read.packed is not None:
        _check_packed(read.packed, shards, documents)
    padding = None
    if attention_mask is not None:
        padding = _gathered(attention_mask, shards, batch_size)
    if padding is not None and read.mask.chunk:
        raise InputError(f"chunked attention with padding cannot be shared by the ranks: pack documents. {REMEDY}")
    return replace(read.mask, padding=padding, documents=documents)


class Reading:
    """A mask function, read. `mask`: what it says; `packed`: `[B, tokens]`, ids of what it takes for documents of this rank."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.mask = Mask()
        self.packed: Tensor | None = None
        self._read(function)

    def _read(self, function: Any) -> None:
        found = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        name = getattr(function, "__qualname__", type(function).__name__)
        module = getattr(function, "__module__", "")
        match name.removesuffix(".<locals>.inner_mask") if module == "transformers.masking_utils" else "":
            case "bidirectional_mask_function":
                pass
            case "causal_mask_function":
                self.mask = replace(self.mask, is_causal=True)
            case "sliding_window_overlay":
                self.mask = replace(self.mask, window=self._narrower(found["sliding_window"]))
            case "sliding_window_bidirectional_overlay":
                window = int(found["sliding_window"])
                self.mask = replace(self.mask, window=self._narrower(window + 1), lookahead=window)
            case "chunked_overlay" if not self.mask.chunk:
                self.mask = replace(self.mask, chunk=int(found["chunk_size"]))
            case "packed_sequence_mask_function":
                self.packed = found["packed_sequence_mask"]
            case "remap_positions_for_packed_sequence":
                self._read(found["mask_function"])
            case "and_masks.<locals>.and_mask":
                for each in found["mask_functions"]:
                    self._read(each)
            case _:
                inner = [getattr(each, "__qualname__", "?") for each in found.get("mask_functions", ())]
                parts = f" of {', '.join(inner)}" if inner else ""
                raise InputError(f"the mask function {module}.{name}{parts} is not understood. {REMEDY}")

    def _narrower(self, window: int) -> int:
        return min(int(window), self.mask.window or int(window))


def _gathered(attention_mask: Tensor, shards: Shards, batch_size: int) -> Tensor | None:
    """Return the padding of all ranks' tokens, or None where there is none."""
    if attention_mask.shape != (batch_size, shards.num_slots):
        raise InputError(
            f"attention_mask is {list(attention_mask.shape)}: pass this rank's part of it, {[batch_size, shards.num_slots]}."
        )
    ring = state.ring()
    # Every rank is asked, also where this one's tokens are all visible.
    visible = process_group.all_gather(attention_mask.to(torch.uint8), ring.size, ring.group)
    whole = shards.join(visible, 1).bool()
    return None if whole.all() else whole


def _check_packed(packed: Tensor, shards: Shards, documents: Documents) -> None:
    """Refuse documents that the model finds in this rank's positions and update_ring_attn_params was not told of."""
    position = shards.positions(state.ring().rank)
    rows = documents.starts or ((0,),)
    follows = torch.nn.functional.pad(position.diff() == 1, (1, 0))
    may_begin = torch.stack([torch.isin(position, torch.tensor(row)) for row in rows])
    begins = torch.nn.functional.pad(packed.diff(dim=1) != 0, (1, 0)).cpu()
    unknown = begins & follows & ~may_begin & (position < shards.length)
    if unknown.any():
        row, slot = unknown.nonzero()[0].tolist()
        raise InputError(
            f"position_ids restart at token {int(position[slot])} of row {row}, where no document is known to begin: call "
            "update_ring_attn_params(position_ids) with those of the whole batch before the model."
        )
