"""A batch for one rank: every tensor with tokens is padded and cut, and labels are shifted before that, not after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cpcompile.compat._axolotl_layout import RingAttnFunc, Shards
from cpcompile.compat._axolotl_register import update_ring_attn_params
from cpcompile.errors import InputError

Tensor = torch.Tensor
IGNORED = -100  # the label that transformers' losses leave out
REMEDY = "Use cpcompile.apply(model, mesh), which transforms the whole model."


def apply_sequence_parallelism(
    batch: Mapping[str, Any],
    local_rank: int,
    local_world_size: int,
    gradient_accumulation_steps: int,
    ring_attn_func: RingAttnFunc,
) -> tuple[dict[str, Any], int, int]:
    """Return (this rank's part of a batch, tokens of a row, tokens of padding), and set the documents of the coming forward.

    With labels, the part has `shift_labels`, shifted in the whole sequence, and a `num_items_in_batch` for which the mean of the
    ranks' losses is the loss of one device. Without padding, `attention_mask` is None.

    Args:
        batch: arguments of the model for the whole sequence, the same on all ranks; `position_ids` begin again with each
            document.
        local_rank, local_world_size: of the group.
        gradient_accumulation_steps: is not needed: `num_items_in_batch` counts the labels of all steps.
        ring_attn_func: which tokens a rank holds.

    Raises:
        ConfigError: no group is registered.
        InputError: an argument whose part is not known.
    """
    del gradient_accumulation_steps
    batch = dict(batch)
    tokens = next((batch[name] for name in ("input_ids", "inputs_embeds") if batch.get(name) is not None), None)
    if tokens is None:
        raise InputError("the batch has neither input_ids nor inputs_embeds: pass one, for the whole sequence.")
    size, length = tokens.shape[:2]
    _refuse(batch, size, length)
    _set_positions(batch, size, length, tokens.device)
    batch["attention_mask"] = _padding_of(batch.get("attention_mask"))
    shards = Shards.of(ring_attn_func, length, local_world_size)
    fills: dict[str, float] = {"labels": IGNORED, "shift_labels": IGNORED}
    if batch.get("labels") is not None:
        _shift_labels(batch, local_world_size)
    for name, x in batch.items():
        if isinstance(x, torch.Tensor) and x.shape[:2] == (size, length):
            batch[name] = shards.shard(x, 1, local_rank, fills.get(name, 0))
    return batch, length, shards.padding


def _refuse(batch: Mapping[str, Any], size: int, length: int) -> None:
    """Refuse arguments that hold more than tokens, all at once."""
    is_token = {name: isinstance(x, torch.Tensor) and x.shape[:2] == (size, length) for name, x in batch.items()}
    others = [
        f"{name} {list(x.shape)}"
        for name, x in batch.items()
        if isinstance(x, torch.Tensor) and x.dim() > 0 and not is_token[name] and name != "position_ids"
    ]
    if batch.get("past_key_values") is not None or batch.get("use_cache"):
        others.append("a cache")
    if batch.get("logits_to_keep"):
        others.append(f"logits_to_keep={batch['logits_to_keep']}")
    if batch.get("output_router_logits"):
        others.append("output_router_logits, whose loss is not a sum over tokens")
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() != 2:
        others.append(f"attention_mask {list(mask.shape)}")
    if others:
        raise InputError(
            f"the batch has {', '.join(others)}: what a rank is to get of that, beside tokens [{size}, {length}], is not known. "
            f"{REMEDY}"
        )


def _set_positions(batch: dict[str, Any], size: int, length: int, device: torch.device) -> None:
    position_ids = batch.get("position_ids")
    if position_ids is None:
        position_ids = torch.arange(length, device=device).unsqueeze(0)
    elif position_ids.dim() > 2 or position_ids.shape[-1] != length:
        raise InputError(f"position_ids is {list(position_ids.shape)}: pass [{size}, {length}]. {REMEDY}")
    update_ring_attn_params(position_ids)
    batch["position_ids"] = position_ids.expand(size, -1)


def _padding_of(mask: Tensor | None) -> Tensor | None:
    """Return a mask of tokens, or None where all are visible."""
    if mask is None or mask.bool().all():
        return None
    if mask.dtype != torch.bool and mask.max() > 1:
        raise InputError(
            f"attention_mask has values up to {int(mask.max())} beside 0: say which tokens belong together by position_ids that "
            "begin again with each document, and pass no attention_mask, or 0 and 1."
        )
    return mask.bool()


def _shift_labels(batch: dict[str, Any], num_ranks: int) -> None:
    """Add labels shifted in the whole sequence: in a rank's part the label of its last token is another rank's."""
    if batch.get("shift_labels") is None:
        batch["shift_labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:]
    items = batch.get("num_items_in_batch")
    items = (batch["shift_labels"] != IGNORED).sum() if items is None else torch.as_tensor(items)
    batch["num_items_in_batch"] = items.to(batch["labels"].device, torch.float64) / num_ranks
