"""Rank run: the applied model on the processes of all ranks, against the untouched one on the first of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cpcompile.capture.dynamo import by_name, token_length
from cpcompile.errors import InputError, RankFailed, VerificationError
from cpcompile.front.apply import apply, parallel_forward
from cpcompile.inspect.model_runs import Objective, run_and_differentiate
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
from cpcompile.inspect.sweep import EXACT, WRONG, Case
from cpcompile.inspect.verification import LOSS, compared
from cpcompile.inspect.verify import failing_alone
from cpcompile.options.config import Config

NOISE = (
    "the untouched model draws random numbers: with another seed its loss is another. Call model.eval(), set the rate of dropout "
    "to 0, or pass exact_dropout=True to draw what one device draws."
)


class RankRun:
    """The runs of one rank: untouched on the first, then applied on all."""

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: Mapping[str, Any],
        device: torch.device,
        dtype: torch.dtype | None,
        config: Config,
        tolerance: float | None,
    ) -> None:
        self.model, self.config, self.objective = model.to(device=device, dtype=dtype), config, Objective()
        self.inputs = {name: moved(x, device, dtype) for name, x in inputs.items()}
        self.tolerance = tolerance if tolerance is not None else default_tolerance(model_dtype(self.model))
        self.state = State(self.model)

    def compare(self, inner_size: int, options: Mapping[str, Any]) -> Case | None:
        """Return what the first rank finds; None on the others."""
        world_size, is_first = dist.get_world_size(), dist.get_rank() == 0
        one, told = None, [""]
        if is_first:
            try:
                with failing_alone(self.model, self.inputs):
                    one = self.run(self.model.forward)
            except InputError as error:
                dist.broadcast_object_list(["failed"])
                raise error
            told = [self.objective.stand_in]
        dist.broadcast_object_list(told)
        if told == ["failed"]:
            raise RankFailed("the untouched model fails on rank 0.")
        whole = {"outputs": "full"} if told[0] else {}
        names = ("outer", "inner") if inner_size else ("cp",)
        shape = (world_size // inner_size, inner_size) if inner_size else (world_size,)
        mesh = init_device_mesh(next(self.model.parameters()).device.type, shape, mesh_dim_names=names)
        apply(self.model, mesh, axis=("outer", "inner") if inner_size else "cp", **{**options, **whole})
        self.state = State(self.model)  # with what `apply` put there
        ranks = self.run(self.model.forward)
        everywhere: list[Outcome | None] = [None] * world_size
        dist.all_gather_object(everywhere, replace(ranks, gradients={}) if not is_first else ranks)
        if one is None:
            return None
        outcomes = [outcome for outcome in everywhere if outcome is not None]
        merged = Outcome(
            [x for outcome in outcomes for x in outcome.loss],
            ranks.gradients,
            {name: [o.state[name][0] for o in outcomes if name in o.state] for o in outcomes for name in o.state},
        )
        return self.case(one, merged)

    def run(self, forward: Callable[..., Any], seed: int = 0) -> Outcome:
        """Return what a run computes, and leave the model as it was."""
        own = own_inputs(self.inputs)
        try:
            torch.manual_seed(seed)
            loss, gradients = run_and_differentiate(self.model, forward, own, self.objective)
            changed = self.state.changes() | changed_inputs(own, self.inputs)
            gradients = {name: grad.detach().cpu() for name, grad in (gradients | input_gradients(own)).items()}
            return Outcome([loss.cpu()], gradients, {name: [x.detach().cpu().clone()] for name, x in changed.items()})
        finally:
            self.state.restore()

    def case(self, one: Outcome, ranks: Outcome) -> Case:
        """Return the comparison."""
        unfit = set(one.not_finite)
        errors = {name: e for name, e in gradient_errors(one, ranks).items() if name not in unfit}
        changes = state_errors(one, ranks, self.state, self.inputs)
        changes = {name: error for name, error in changes.items() if name not in unfit}
        loss_error = float("nan") if LOSS in unfit else max(relative(x, one.loss[0]) for x in ranks.loss)
        all_errors = [*errors.values(), *changes.values(), *([] if LOSS in unfit else [loss_error])]
        is_exact = all(error <= self.tolerance for error in all_errors)
        verdict = "nothing can be compared" if is_exact and unfit else EXACT if is_exact else WRONG
        parallel = parallel_forward(self.model)
        if verdict == WRONG and not self.config.exact_dropout:
            with parallel.untouched():
                again = self.run(self.model.forward, seed=1)
            if not torch.equal(again.loss[0], one.loss[0]):
                raise VerificationError(NOISE)
        found = Case(
            world_size=dist.get_world_size(),
            tokens=token_length(by_name(parallel.__wrapped__, self.inputs), self.config, mark_dynamic=False) or 0,
            verdict=verdict,
            text="",
            layout=parallel.layout,
            attentions=(self.config.strategy,),
            loss=tuple(map(float, ranks.loss)),
            reference_loss=float(one.loss[0]),
            loss_error=loss_error,
            gradient_errors=errors,
            state_errors=changes,
            tolerance=self.tolerance,
            stand_in=self.objective.stand_in,
        )
        kind = next(self.model.parameters()).device.type
        processes = f"{found.world_size} processes ({'NCCL' if kind == 'cuda' else 'gloo'})"
        how = f"{processes}, layout {found.layout}, inner {self.config.inner}"
        lines = compared(found, how, has_loss=LOSS not in unfit)
        if unfit:
            lines.append(f"  on one device not finite: {', '.join(sorted(unfit)[:4])}")
        return replace(found, text="\n".join(lines))


def moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """Return an input on a device; floating-point tensors in `dtype`, if it is given."""
    if not isinstance(value, torch.Tensor):
        return value
    wanted = dtype if value.is_floating_point() else None
    return value.detach().to(device=device, dtype=wanted).requires_grad_(value.requires_grad)
