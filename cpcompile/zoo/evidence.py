"""Evidence: what one run of the untouched model says about how much a comparison with it would prove."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cpcompile.verification import default_objective, run_and_differentiate
from cpcompile.widen import Widen
from cpcompile.zoo.inputs import FIRST, LAST


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the untouched model computes.

    Attributes:
        dtype: float64 where the model runs in it, else float32.
        loss: its objective.
        gradients: names of the parameters whose gradient is not zero.
        reach: relative change of the loss of the second half of the tokens when those of the first half are others;
            None for models without token ids or labels.
    """

    dtype: torch.dtype
    loss: float
    gradients: frozenset[str]
    reach: float | None


class Unsound(Exception):
    """The untouched model has no loss that a comparison could use."""


def gather_evidence(model: nn.Module, inputs: Mapping[str, Any]) -> Evidence:
    """Run the untouched model in float64, or else in float32 (`model` comes out in that dtype).

    A model that draws random numbers while training is put in evaluation mode.

    Raises:
        Unsound: its loss is not finite, has no gradients, or differs between two runs.
        Exception: what the model itself raises.
    """
    try:
        dtype, (loss, gradients) = torch.float64, run(model, inputs, torch.float64)
    except Exception:
        dtype, (loss, gradients) = torch.float32, run(model, inputs, torch.float32)
    if not torch.equal(loss, run(model, inputs, dtype)[0]):
        model.eval()
        loss, gradients = run(model, inputs, dtype)
        if not torch.equal(loss, run(model, inputs, dtype)[0]):
            raise Unsound("two runs of the model differ")
    live = frozenset(name for name, grad in gradients.items() if bool(grad.any()))
    if not bool(loss.isfinite()) or not all(bool(grad.isfinite().all()) for grad in gradients.values()):
        raise Unsound("the loss or a gradient is not finite")
    if not live:
        raise Unsound("no parameter has a gradient")
    return Evidence(dtype, loss.item(), live, reach(model, inputs, dtype))


def run(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return the objective and the gradients of the model in `dtype`, which it keeps."""
    model.to(dtype)
    given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    if dtype != torch.float64:
        return run_and_differentiate(model, model.forward, given, default_objective)
    with Widen():
        return run_and_differentiate(model, model.forward, given, default_objective)


def reach(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> float | None:
    """Return how much the loss of the second half of the tokens depends on the first half of the tokens."""
    if "input_ids" not in inputs or "labels" not in inputs:
        return None
    half = inputs["input_ids"].shape[1] // 2
    later = {**inputs, "labels": inputs["labels"].clone(), "input_ids": inputs["input_ids"].clone()}
    later["labels"][:, : inputs["labels"].shape[1] // 2] = -100
    with torch.no_grad():
        before = run_forward(model, later, dtype)
        ids = later["input_ids"][:, :half]
        is_text = (ids >= FIRST) & (ids < LAST)
        later["input_ids"][:, :half] = torch.where(is_text, FIRST + LAST - 1 - ids, ids)
        after = run_forward(model, later, dtype)
    return ((after - before).abs() / before.abs()).item()


def run_forward(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> torch.Tensor:
    """Return the objective of the model."""
    given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    return default_objective(model(**given))
