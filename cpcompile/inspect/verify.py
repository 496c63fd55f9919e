"""Verify: all ranks of the transformed program, in this process, against the untouched model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cpcompile.capture.arguments import describe_call_inside
from cpcompile.capture.dynamo import by_name, compile_whole, token_length, uncompiled
from cpcompile.capture.faults import summary
from cpcompile.capture.lowering import line_of
from cpcompile.errors import ConfigError, CPError, InputError
from cpcompile.inspect.first_difference import first_difference
from cpcompile.inspect.float64 import Widen
from cpcompile.inspect.model_runs import LockstepBackend, Objective, OneDevice, run_and_differentiate, seeded
from cpcompile.inspect.not_finite import Watch
from cpcompile.inspect.outcome import (
    Outcome,
    changed_inputs,
    default_tolerance,
    gradient_errors,
    input_gradients,
    model_dtype,
    relative,
    state_errors,
)
from cpcompile.inspect.state import State, own_inputs
from cpcompile.inspect.verification import LOSS, Verification
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.runtime.tokens.show import quiet


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
        with (
            widened,
            by_definition,
            contextlib.nullcontext() if has_documents else failing_alone(self.model, self.inputs),
        ):
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
def failing_alone(model: torch.nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
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
        reason = f"the model fails on these inputs without cpcompile, on one device: {summary(error)}"
        raise InputError((describe_call_inside(model, inputs, error) or reason) + line) from error
