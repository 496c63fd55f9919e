"""Verify: all ranks of the transformed program, in this process, against the untouched model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpcompile.capture.dynamo import by_name, compile_whole, token_length, uncompiled
from cpcompile.capture.faults import summary
from cpcompile.capture.lowering import line_of
from cpcompile.errors import ConfigError, CPError, InputError
from cpcompile.inspect.first_difference import first_difference, value_error
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend, Objective, OneDevice, run_and_differentiate, seeded
from cpcompile.inspect.not_finite import Watch, kind_of
from cpcompile.inspect.state import State, is_same, own_inputs
from cpcompile.inspect.verification import LOSS, Verification
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.runtime.tokens.show import quiet

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
    """Run `model` untouched, and as `world_size` ranks in lockstep, and compare loss, every gradient and every buffer.

    Needs no processes and no GPU. The model, its inputs, their gradients and the random generators are left as they were. With
    `documents`, the model is not untouched: the program of one device in which documents are separated is what the ranks are
    compared with.

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
    verifier = Verifier(model, inputs, dtype=dtype, tolerance=tolerance, objective=objective)
    return verifier(world_size=world_size, inner_size=inner_size, **options)


class Verifier:
    """A model with its inputs, verified as often as called: for other ranks, or strict or not, it is not traced again.

    The arguments are those of `verify`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        tolerance: float | None = None,
        objective: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.inputs, self.dtype = uncompiled(model), inputs, dtype
        self.tolerance, self.objective = tolerance, Objective(objective)
        self._traced: tuple[Config, Runs, Outcome] | None = None

    @quiet()
    def __call__(self, *, world_size: int, inner_size: int = 0, **options: Any) -> Verification:
        """Return the comparison. Raises what `verify` does."""
        if options.get("memory"):
            raise ConfigError(
                "verify runs one plan: memory_budget=... (and tile=...) is what memory='fit' chooses among."
            )
        axis, config = Axis.in_process(world_size, inner_size), replace(Config.of(options), kernel="auto")
        config.check_axis(inner_size)
        runs, one = self._runs(config)
        runs.ranks.aim(config, axis)
        return self._compare(runs, one, runs.of_ranks(), world_size)

    def _runs(self, config: Config) -> tuple[Runs, Outcome]:
        """Return the runs of a model with these options, and what one device computes."""
        as_traced = replace(config, strict=True)
        if self._traced is None or self._traced[0] != as_traced:
            refuse_unrunnable(self.model, by_name(self.model.forward, self.inputs, beside=config.told_by), config)
            runs = Runs(self.model, self.inputs, self.dtype, self.objective, config)
            self._traced = as_traced, runs, runs.of_one_device()
        return self._traced[1:]

    def _compare(self, runs: Runs, one: Outcome, all_ranks: Outcome, world_size: int) -> Verification:
        ranks = runs.ranks
        assert ranks.transformed is not None
        reference_loss, unfit = one.loss[0], set(one.not_finite)
        errors = {name: error for name, error in gradient_errors(one, all_ranks).items() if name not in unfit}
        limit = self.tolerance if self.tolerance is not None else default_tolerance(model_dtype(runs.model))
        changes = state_errors(one, all_ranks, runs.state, runs.inputs)
        result = Verification(
            world_size,
            tuple(map(float, all_ranks.loss)),
            float(reference_loss),
            math.nan if LOSS in unfit else max(relative(value, reference_loss) for value in all_ranks.loss),
            errors,
            limit,
            None,
            ranks.transformed,
            {name: error for name, error in changes.items() if name not in unfit},
            stand_in=self.objective.stand_in,
        )
        if unfit:
            watch = Watch(ranks.transformed.original)
            with watch.hooks():
                runs.of_backend(watch)
            result = replace(result, not_finite=watch.first(reference_loss, one.not_finite))
        if not result.is_wrong:
            return result
        first = first_difference(runs.model, ranks.transformed, ranks.inputs, world_size, limit)
        return replace(result, first_difference=first)


class Runs:
    """Runs of one model on its inputs; it begins each as it is now, and is left so.

    Attributes:
        model: in the dtype that is asked for.
        inputs: likewise.
        ranks: the backend that runs all ranks.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        dtype: torch.dtype | None,
        objective: Callable[[Any], torch.Tensor],
        config: Config,
    ) -> None:
        self.config, self.objective, self.is_wide = config, objective, dtype == torch.float64
        self.model, self.inputs = model, inputs
        if dtype is not None:
            self.model = copy.deepcopy(model).to(dtype)
            self.inputs = {
                n: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for n, x in inputs.items()
            }
        self.state = State(self.model)
        self.ranks = LockstepBackend(config, Axis.in_process(1), self.is_wide)
        self._of_ranks = compile_whole(self.model.forward, self.ranks, config)

    def of_one_device(self) -> Outcome:
        """Return what the model computes untouched; with `documents`, as the program in which these are separated."""
        # The graph in which documents are separated is widened itself, and Dynamo does not trace everything under the mode.
        has_documents = bool(self.config.documents)
        widened = Widen() if self.is_wide and not has_documents else contextlib.nullcontext()
        # Kernels that recompute weights from a log-sum-exp lose rows in which masks of finfo.min hide every key.
        by_definition = sdpa_kernel(SDPBackend.MATH) if self.is_wide else contextlib.nullcontext()
        with widened, by_definition, contextlib.nullcontext() if has_documents else failing_alone():
            return self.of_backend(OneDevice(self.config, self.is_wide) if has_documents else None)

    def of_ranks(self) -> Outcome:
        """Return what all ranks compute."""
        return self._run(self._of_ranks, self.ranks.of_ranks)

    def of_backend(self, backend: Callable[..., Any] | None) -> Outcome:
        """Return what the model computes as it is, or compiled by `backend`."""
        forward = self.model.forward
        return self._run(forward if backend is None else compile_whole(forward, backend, self.config), lambda x: [x])

    def _run(self, forward: Callable[..., Any], of_ranks: Callable[[torch.Tensor], list[torch.Tensor]]) -> Outcome:
        own = own_inputs(self.inputs)
        is_compiled = forward != self.model.forward
        given = by_name(self.model.forward, own, beside=self.config.told_by) if is_compiled else own
        try:
            with seeded(self.model):
                config = self.config if is_compiled else None
                loss, gradients = run_and_differentiate(self.model, forward, given, self.objective, config)
            changed = self.state.changes() | changed_inputs(own, self.inputs)
            left = {name: [value.detach().clone() for value in of_ranks(x)] for name, x in changed.items()}
            return Outcome(of_ranks(loss), gradients | input_gradients(own), left)
        finally:
            self.state.restore()


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


def refuse_unrunnable(model: torch.nn.Module, inputs: Mapping[str, Any], config: Config) -> None:
    """Refuse what has no values to compare.

    Raises:
        InputError: the inputs hold no tokens, or something is on the meta device.
    """
    token_length(inputs, config, mark_dynamic=False)
    tensors = itertools.chain(model.named_parameters(), model.named_buffers(), inputs.items())
    name = next((name for name, x in tensors if isinstance(x, torch.Tensor) and x.is_meta), "")
    if name:
        raise InputError(
            f"verify compares values, and {name} is on the meta device, which has none: use cpcompile.explain, or give the model "
            "values first (model.to_empty(device='cpu'), then initialise or load it)."
        )


@contextlib.contextmanager
def failing_alone() -> Iterator[None]:
    """Say of an error of the untouched model that it is one.

    Raises:
        InputError: from the original error, with the innermost line outside torch.
    """
    try:
        yield
    except (CPError, Warning):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = line_of([frame for frame in frames if not frame.filename.startswith(str(Path(__file__).parents[1]))])
        raise InputError(
            f"the model fails on these inputs without cpcompile, on one device: {summary(error)}{line}"
        ) from error


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
    """Return the error of each gradient of one device."""
    largest = max((g.norm().item() for g in one.gradients.values()), default=0.0)
    return {name: gradient_error(ranks.gradients.get(name), grad, largest) for name, grad in one.gradients.items()}


def gradient_error(grad: torch.Tensor | None, reference: torch.Tensor, largest: float) -> float:
    """Return the norm of the difference, relative to the gradient's norm or the noise floor."""
    difference = reference if grad is None else grad - reference
    scale: float = max(reference.norm().item(), NOISE_FLOOR * largest)
    norm: float = difference.norm().item()
    if math.isnan(norm) and bool(reference.isnan().any()):
        return 0.0
    return norm / scale if scale else norm
