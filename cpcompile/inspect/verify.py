"""Verify: all ranks of the transformed program, in this process, against the untouched model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.compile.transform import Transformed
from cpcompile.errors import VerificationError
from cpcompile.inspect.first_difference import Difference, first_difference
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend, OneDevice, default_objective, run_and_differentiate, seeded
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

# Relative, of norms, in units in the last place. Rounding errors of sums in another order grow like the root of
# their length times the depth of the network: a few hundred for the models that fit one process. In half precision
# sums are taken in float32 and every result is rounded once, so that errors stay near the rounding of one result.
TOLERANCE_ULPS = 256
HALF_TOLERANCE_ULPS = 8
# A gradient that cancels to nothing (a key bias under softmax) has only noise: it is measured against this
# part of the largest gradient.
NOISE_FLOOR = 1e-2


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        world_size: ranks of the axis.
        loss: the transformed program's objective on each rank.
        reference_loss: the untouched model's.
        loss_error: largest relative difference between them.
        gradient_errors: relative difference of each parameter's gradient (norm of the difference over norm).
        tolerance: what both must stay under.
        first_difference: where the forward values first differ, if they do.
        transformed: the graphs and the plan.
    """

    world_size: int
    loss: tuple[float, ...]
    reference_loss: float
    loss_error: float
    gradient_errors: Mapping[str, float]
    tolerance: float
    first_difference: Difference | None
    transformed: Transformed

    @property
    def ok(self) -> bool:
        """Whether loss and every gradient agree."""
        return not math.isnan(self.loss_error) and max(self.loss_error, self.worst_gradient[1]) <= self.tolerance

    @property
    def worst_gradient(self) -> tuple[str, float]:
        """The parameter whose gradient differs most, and by how much; NaN counts as most."""
        return max(
            self.gradient_errors.items(),
            key=lambda item: math.inf if math.isnan(item[1]) else item[1],
            default=("", 0.0),
        )

    def raise_if_wrong(self) -> None:
        """Raise `VerificationError` unless `ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        plan, (name, error) = self.transformed.plan, self.worst_gradient
        lines = [
            f"{'exact' if self.ok else 'WRONG'} for {self.world_size} ranks, layout {plan.layout}, attention "
            f"{', '.join(sorted(set(self.transformed.choice.strategies))) or 'none'} (tolerance {self.tolerance:.1e}, relative)",
            f"  loss       {self.loss[0]:.10g}   single device {self.reference_loss:.10g}   error {self.loss_error:.1e}",
            f"  gradients  {len(self.gradient_errors)} compared   worst {name or '-'}   error {error:.1e}",
        ]
        if self.first_difference is not None:
            first = self.first_difference
            lines += [f"  first diverging node: {first.node}, error {first.error:.1e}", f"  {first.place}"]
        elif not self.ok:
            wrong = [n for n, e in self.gradient_errors.items() if not e <= self.tolerance]
            lines.append(f"  every forward value agrees; {len(wrong)} gradient(s) differ: {', '.join(wrong[:8])}")
        return "\n".join(lines)


def verify(
    model: torch.nn.Module,
    inputs: Mapping[str, Any],
    *,
    world_size: int,
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    objective: Callable[[Any], torch.Tensor] | None = None,
    **options: Any,
) -> Verification:
    """Run `model` untouched, and as `world_size` ranks in lockstep, and compare loss and every gradient.

    Needs no processes and no GPU. The model's gradients are left as they were. With `documents`, the model is not untouched: the
    program of one device in which documents are separated is what the ranks are compared with.

    Args:
        model: the single-device model, on any device.
        inputs: its keyword arguments: the whole batch, labels included.
        world_size: ranks to simulate.
        inner_size: how many of them exchange heads in `strategy="usp"`, where they are a grid.
        dtype: run a copy of the model in this dtype; `torch.float64` separates errors from rounding (float32
            casts are widened too).
        tolerance: largest relative error; by default 256 units in the last place of the dtype, 8 for half precision.
        objective: from the model's output to the scalar to differentiate; by default its loss, or else a
            fixed random projection of all its floating-point outputs.
        options: the fields of `cpcompile.Config`. Attention is computed as it is defined, whatever `kernel` says.

    Returns:
        The comparison; `.ok` tells whether it is within the tolerance, `print` it for details.

    Raises:
        CPError: the model is refused, or dropout makes any two runs differ (not with `exact_dropout=True`).
    """
    axis, config = Axis.in_process(world_size, inner_size), replace(Config.of(options), kernel="auto")
    config.check_axis(inner_size)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
        inputs = {
            n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()
        }
    objective = objective or default_objective
    is_wide = dtype == torch.float64
    # The graph in which documents are separated is widened itself, and Dynamo does not trace everything under the mode.
    with Widen() if is_wide and not config.documents else contextlib.nullcontext(), seeded(model):
        if config.documents:
            whole = compile_whole(model.forward, OneDevice(config, is_wide), config)
            named = by_name(model.forward, inputs, beside=config.told_by)
            reference_loss, reference = run_and_differentiate(model, whole, named, objective, config)
        else:
            reference_loss, reference = run_and_differentiate(model, model.forward, inputs, objective)
    ranks = LockstepBackend(config, axis, is_wide)
    with seeded(model):
        loss, gradients = run_and_differentiate(
            model,
            compile_whole(model.forward, ranks, config),
            by_name(model.forward, inputs, beside=config.told_by),
            objective,
            config,
        )
    assert ranks.transformed is not None
    error = max(relative(value, reference_loss) for value in (loss, *ranks.scalars(loss)))
    largest = max((g.norm().item() for g in reference.values()), default=0.0)
    errors = {name: gradient_error(gradients.get(name), grad, largest) for name, grad in reference.items()}
    limit = tolerance if tolerance is not None else default_tolerance(model_dtype(model))
    result = Verification(
        world_size, (float(loss),), float(reference_loss), error, errors, limit, None, ranks.transformed
    )
    if result.ok:
        return result
    first = first_difference(model, ranks.transformed, ranks.inputs, world_size, limit)
    return replace(result, first_difference=first)


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


def gradient_error(grad: torch.Tensor | None, reference: torch.Tensor, largest: float) -> float:
    """Return the norm of the difference, relative to the gradient's norm or the noise floor."""
    difference = reference if grad is None else grad - reference
    scale: float = max(reference.norm().item(), NOISE_FLOOR * largest)
    norm: float = difference.norm().item()
    if math.isnan(norm) and bool(reference.isnan().any()):
        return 0.0
    return norm / scale if scale else norm
