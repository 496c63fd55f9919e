"""Real: ranks as processes, each with the applied model, against the untouched one on the first of them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from cpcompile.capture.dynamo import by_name, token_length
from cpcompile.errors import CPError, InputError, RankFailed, VerificationError
from cpcompile.front.apply import apply, parallel_forward
from cpcompile.inspect.model_runs import Objective, run_and_differentiate
from cpcompile.inspect.state import State, own_inputs
from cpcompile.inspect.sweep import EXACT, FAILED, WRONG, Case
from cpcompile.inspect.verification import LOSS, compared
from cpcompile.inspect.verify import (
    Outcome,
    changed_inputs,
    default_tolerance,
    failing_alone,
    gradient_errors,
    input_gradients,
    model_dtype,
    relative,
    state_errors,
)
from cpcompile.options.config import Config

Make = Callable[[], tuple[torch.nn.Module, Mapping[str, Any]]]

NOISE = (
    "the untouched model draws random numbers: with another seed its loss is another. Call model.eval(), set the rate of dropout "
    "to 0, or pass exact_dropout=True to draw what one device draws."
)


def verify_real(
    make: Make,
    *,
    world_size: int,
    inner_size: int = 0,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    device: str = "auto",
    **options: Any,
) -> Case:
    """Start a process for each rank, and compare the applied model with the untouched one on rank 0: loss, gradients, buffers.

    Unlike `verify` it runs what training runs: messages, kernels and the inner compiler.

    Args:
        make: a function of a module, without arguments, that returns the model and its inputs; each rank calls it.
        world_size: ranks to start, all on this host.
        inner_size: how many of them exchange heads in `strategy="usp"`, where they are a grid.
        dtype: of the model and its inputs; their own by default.
        tolerance: largest relative error; by default that of `verify`.
        device: `cpu` (gloo), `cuda` (NCCL, a GPU for each rank), or `auto`: GPUs where there are enough.
        options: the fields of `cpcompile.Config`. A model without a loss returns its outputs whole.

    Returns:
        The comparison. Its verdict is `refused` for a `CPError` of any rank, and `failed` where a rank died, which its text
        names, with the traceback.

    Raises:
        ConfigError: an option that does not fit, or too few GPUs.
    """
    Config.of(options).check_axis(inner_size)
    kind = device_kind(device, world_size)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="spawn",
    )
    with tempfile.TemporaryDirectory(prefix="cpcompile-") as folder, quiet():
        try:
            found = elastic_launch(config, run_rank)(make, kind, inner_size, dtype, tolerance, options, folder)
        except ChildFailedError as error:
            text = death(error, Path(folder), world_size)
            return Case(world_size=world_size, tokens=0, verdict=FAILED, text=text, error=type(error).__name__)
    errors = [case for case in found.values() if case is not None and case.error]
    # What ended a rank first ends the others too, which know nothing else.
    own = [case for case in errors if case.error != RankFailed.__name__]
    case: Case = (own or errors or [found[0]])[0]
    return case


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the launcher from logging: how a rank ended is in the result."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def death(error: ChildFailedError, folder: Path, world_size: int) -> str:
    """Return which rank died first, and why: by a signal, or by an exception that it left in `folder`."""
    rank, failure = error.get_first_failure()
    left = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    if failure.exitcode < 0 or not left:
        return f"rank {rank} of {world_size} died: {failure.message}"
    # The others fail after it, by what they can no longer reach.
    return f"rank {left[0].name} of {world_size} died:\n\n{left[0].read_text()}"


def device_kind(device: str, world_size: int) -> str:
    """Return `cpu` or `cuda`.

    Raises:
        InputError: there are fewer GPUs than ranks.
    """
    count = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and count < world_size:
        raise InputError(f"{world_size} ranks need as many GPUs, and there are {count}: use device='cpu'.")
    return "cuda" if device != "cpu" and count >= world_size else "cpu"


def run_rank(
    make: Make,
    kind: str,
    inner_size: int,
    dtype: torch.dtype | None,
    tolerance: float | None,
    options: dict[str, Any],
    folder: str,
) -> Case | None:
    """Be one of the ranks; return what the first found, or the refusal that ended this one. Others are left in `folder`."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if sys.platform == "linux":
        # Local ranks meet on the loopback device; the host's own name may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
    try:
        model, inputs = make()
        run = RankRun(model, inputs, device, dtype, Config.of(options), tolerance)
        found = run.compare(inner_size, options)
        dist.destroy_process_group()
        return found
    except CPError as error:
        return Case.of_error(error, world_size, 0)
    except Exception:
        (Path(folder) / str(rank)).write_text(traceback.format_exc())
        raise


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
                with failing_alone():
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
