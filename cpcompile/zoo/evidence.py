"""Evidence: what one run of the untouched model says about how much a comparison with it would prove."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import default_objective, run_and_differentiate
from cpcompile.inspect.outcome import gradient_error, relative
from cpcompile.zoo.inputs import FIRST, LAST

ROUNDING = 1e-4
Run = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the untouched model computes.

    Attributes:
        dtype: float64 where the model runs in it, else float32.
        loss: its objective.
        gradients: names of the parameters whose gradient is not zero.
        training: the mode in which two runs of the model agree.
        is_random: in training mode the model draws random numbers, whether or not they change anything.
    """

    dtype: torch.dtype
    loss: float
    gradients: frozenset[str]
    training: bool
    is_random: bool


class Unsound(Exception):
    """The untouched model has no loss that a comparison could use."""


def gather_evidence(model: nn.Module, inputs: Mapping[str, Any], widest: torch.dtype = torch.float64) -> Evidence:
    """Run a copy of the untouched model in `widest`, or else in float32: some models keep what their last run computed.

    A model that draws random numbers while training is run in evaluation mode.

    Raises:
        Unsound: its loss is not finite, has no gradients, or differs between two runs.
        Exception: what the model itself raises.
    """
    model = copy.deepcopy(model)
    try:
        dtype, first = widest, run(model, inputs, widest)
    except Exception:
        if widest == torch.float32:
            raise
        dtype, first = torch.float32, run(model, inputs, torch.float32)
    generator = random_state()
    again = run(model, inputs, dtype)
    is_random = random_state() != generator
    if not agree(first, again):
        model.eval()
        first = run(model, inputs, dtype)
        if not agree(first, run(model, inputs, dtype)):
            raise Unsound("two runs of the model differ")
    loss, gradients = first
    live = frozenset(name for name, grad in gradients.items() if bool(grad.any()))
    if not bool(loss.isfinite()) or not all(bool(grad.isfinite().all()) for grad in gradients.values()):
        raise Unsound("the loss or a gradient is not finite")
    if not live:
        raise Unsound("no parameter has a gradient")
    return Evidence(dtype, loss.item(), live, model.training, is_random)


def random_state() -> list[bytes]:
    """Return the state of the random generators of this process."""
    has_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if has_gpu else ())]
    return [state.numpy().tobytes() for state in states]


def agree(first: Run, second: Run) -> bool:
    """Tell whether two runs agree up to rounding: on a GPU the order of a sum may be another one."""
    (loss, gradients), (again, others) = first, second
    largest = max((grad.norm().item() for grad in gradients.values()), default=0.0)
    errors = [gradient_error(others[name], grad, largest) for name, grad in gradients.items()]
    return max([relative(again, loss), *errors]) < ROUNDING


def run(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> Run:
    """Return the objective and the gradients of the model in `dtype`, which it keeps."""
    model.to(dtype)
    given = in_dtype(inputs, dtype)
    with Widen() if dtype == torch.float64 else contextlib.nullcontext():
        return run_and_differentiate(model, model.forward, given, default_objective)


def in_dtype(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the inputs with their floating-point tensors, those in lists and the like too, in `dtype`."""

    def converted(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype) if x.is_floating_point() else x

    found: dict[str, Any] = tree_map_only(torch.Tensor, converted, dict(inputs))
    return found


def changed_by_capture(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Tell whether the untouched model computes something else when `torch.compile` only traces it.

    Code that asks whether it is traced, as transformers does for its masks, may hold two models in one.
    """
    model = copy.deepcopy(model)
    first = run(model, inputs, torch.float32)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager", dynamic=False)
    return not agree(first, run(model, inputs, torch.float32))


def reach(model: nn.Module, inputs: Mapping[str, Any], dtype: torch.dtype) -> float:
    """Return the relative change of the loss of the second half of the tokens when those of the first half are others."""
    ids, labels = inputs["input_ids"], inputs["labels"].clone()
    labels[:, : labels.shape[1] // 2] = -100
    half = ids[:, : ids.shape[1] // 2]
    is_text = (half >= FIRST) & (half < LAST)
    others = torch.where(is_text, FIRST + LAST - 1 - half, half)
    changed = torch.cat([others, ids[:, ids.shape[1] // 2 :]], dim=1)
    before, after = (run(model, {**inputs, "labels": labels, "input_ids": x}, dtype)[0] for x in (ids, changed))
    return ((after - before).abs() / before.abs()).item()
