"""TRL: the log-probabilities that its trainers ask a model for, computed token by token from its logits.

TRL's own head computes them in an `autograd.Function`, whose backward cannot be followed.
"""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch.nn import functional as F

from cpcompile.errors import ConfigError

KNOWN = {"log_probs", "entropy", "is_top1", "mean_logits", "log_sum_sq_probs"}

CAST = "cast_lm_head_to_fp32"


def replace_fused_head(model: torch.nn.Module) -> None:
    """Replace the forward that TRL's `add_fused_lm_head` has given a model; other models are left alone.

    `model(..., labels=labels, fused_lm_head=True)` then returns the same fields from the logits of the rank's tokens, which are
    in memory for as long as those of any model of transformers.

    Raises:
        ConfigError: this TRL computes something that is not known here.
    """
    forward = getattr(model.forward, "__func__", None)
    if getattr(getattr(forward, "__code__", None), "co_name", "") != "_fused_forward":
        return
    found = inspect.getclosurevars(forward).nonlocals  # type: ignore[arg-type]
    wanted, temperature = set(found.get("outputs", ())), found.get("temperature", 0.0)
    if not wanted or not wanted <= KNOWN or not temperature or "original_forward" not in found or found.get(CAST):
        raise ConfigError(
            f"TRL's trainer wants {', '.join(sorted(wanted)) or 'unknown values'} of each token, of which "
            f"{', '.join(sorted(KNOWN))} are known: use the trainers for supervised or preference training, of TRL "
            "1.16 or near it."
        )
    model.forward = types.MethodType(token_by_token(found["original_forward"], temperature, wanted), model)


def token_by_token(original: Any, temperature: float, wanted: set[str]) -> Any:
    """Return a forward with TRL's signature over the model's own."""
    from trl.trainer.utils import FusedCausalLMOutput

    @functools.wraps(original.__func__)
    def forward(
        self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, shift_labels: Any = None, **kwargs: Any
    ) -> Any:
        if not fused_lm_head:
            kwargs |= {name: x for name, x in (("labels", labels), ("shift_labels", shift_labels)) if x is not None}
            return original(*args, **kwargs)
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = original(*args, **(kwargs | {"use_cache": False}))
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        mask = targets != -100
        logits = outputs.logits.float() / temperature
        scores = logits.log_softmax(-1)
        log_probs = scores.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0)
        fields = {"log_probs": log_probs}
        if "entropy" in wanted:
            fields["entropy"] = -(scores.exp() * scores).sum(-1).masked_fill(~mask, 0)
        if "mean_logits" in wanted:
            fields["mean_logits"] = logits.detach().mean(-1).masked_fill(~mask, 0)
        if "log_sum_sq_probs" in wanted:
            fields["log_sum_sq_probs"] = (2 * scores.detach()).logsumexp(-1).masked_fill(~mask, 0)
        if "is_top1" in wanted:
            fields["is_top1"] = (scores.argmax(-1) == targets).masked_fill(~mask, False)
        loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
        aux_loss = getattr(outputs, "aux_loss", None)
        if aux_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        fields["label_mask"] = mask
        end = None if shift_labels is not None else -1  # of a last token nothing is predicted
        return FusedCausalLMOutput(loss=loss, aux_loss=aux_loss, **{name: x[:, :end] for name, x in fields.items()})

    return forward
