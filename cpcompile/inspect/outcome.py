"""Outcome: what one run of a model computes and leaves behind, and how far another is from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cpcompile.inspect.first_difference import value_error
from cpcompile.inspect.not_finite import kind_of
from cpcompile.inspect.state import State, is_same
from cpcompile.inspect.verification import LOSS

# Relative, of norms, in units in the last place. Rounding errors of sums in another order grow like the root of
# their length times the depth of the network: a few hundred for the models that fit one process. In half precision
# sums are taken in float32 and every result is rounded once, so that errors stay near the rounding of one result.
TOLERANCE_ULPS = 256
HALF_TOLERANCE_ULPS = 8
# A gradient that cancels to nothing (a key bias under softmax) has only noise: it is measured against this
# part of the largest gradient.
NOISE_FLOOR = 1e-2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a model computes, and what it leaves behind: of each rank, the first rank's first.

    Attributes:
        loss: the objective.
        gradients: of parameters and inputs.
        state: what is not as it was before, of buffers, parameters and inputs.
    """

    loss: list[torch.Tensor]
    gradients: dict[str, torch.Tensor]
    state: dict[str, list[torch.Tensor]]

    @property
    def not_finite(self) -> list[str]:
        """What is not finite."""
        values = [(LOSS, self.loss), *((n, [g]) for n, g in self.gradients.items()), *self.state.items()]
        return [name for name, found in values if any(kind_of(x) for x in found)]


def input_gradients(inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the gradients of the inputs that require one, by name."""
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    return {f"input {name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in tensors.items()}


def changed_inputs(own: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the inputs that a run has written, by name."""
    tensors = {name: x for name, x in own.items() if isinstance(x, torch.Tensor)}
    return {f"input {name}": x for name, x in tensors.items() if not is_same(x, inputs[name])}


def state_errors(one: Outcome, ranks: Outcome, state: State, inputs: Mapping[str, Any]) -> dict[str, float]:
    """Return the error of each thing that a run of one device or of the ranks leaves changed, on the worst rank."""

    def values(outcome: Outcome, name: str) -> list[torch.Tensor | None]:
        unchanged = inputs[name.removeprefix("input ")] if name.startswith("input ") else state.of(name)
        return [*outcome.state.get(name, [unchanged])]

    def error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
        # One side may make a buffer that the other has not.
        return math.inf if found is None or expected is None else value_error(found, expected.to(found.device))

    names = one.state | ranks.state
    return {name: max(error(x, values(one, name)[0]) for x in values(ranks, name)) for name in names}


def model_dtype(model: torch.nn.Module) -> torch.dtype:
    """Return the least precise floating-point dtype of the parameters."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} or {torch.get_default_dtype()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def default_tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding alone explains."""
    eps = torch.finfo(dtype).eps
    return eps * (TOLERANCE_ULPS if eps < torch.finfo(torch.float16).eps else HALF_TOLERANCE_ULPS)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the relative difference of two scalars; two NaNs agree (a batch without labels has no loss)."""
    if bool(a.isnan()) and bool(b.isnan()):
        return 0.0
    return ((a - b).abs() / b.abs().clamp(min=torch.finfo(b.dtype).tiny)).item()


def gradient_errors(one: Outcome, ranks: Outcome) -> dict[str, float]:
    """Return the error of each gradient of one device.

    Where none changes the loss by more than its rounding, all are noise (every token that reaches the loss is padding): the loss
    stands for the largest.
    """
    largest = max((g.norm().item() for g in one.gradients.values()), default=0.0)
    loss = one.loss[0].abs().item()
    if largest <= min(torch.finfo(one.loss[0].dtype).eps, torch.finfo(torch.float32).eps) * loss:
        largest = loss
    return {name: gradient_error(ranks.gradients.get(name), grad, largest) for name, grad in one.gradients.items()}


def gradient_error(grad: torch.Tensor | None, reference: torch.Tensor, largest: float) -> float:
    """Return the norm of the difference, relative to the gradient's norm or the noise floor."""
    difference = reference if grad is None else grad - reference
    scale: float = max(reference.norm().item(), NOISE_FLOOR * largest)
    norm: float = difference.norm().item()
    if math.isnan(norm) and bool(reference.isnan().any()):
        return 0.0
    return norm / scale if scale else norm
