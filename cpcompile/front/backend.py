"""The `torch.compile` backend: `torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...})`."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile._torch import fsdp
from cpcompile.capture.lowering import FSDP_REMEDY, break_text
from cpcompile.capture.stages import say, stage
from cpcompile.compile.deferred_outputs import defer_outputs
from cpcompile.compile.inner import compile_inner, transform_dynamo_graph
from cpcompile.compile.parameter_writes import parameter_writes
from cpcompile.compile.transform import Transformed
from cpcompile.errors import TORCH, ConfigError, GraphBreakError, InputError
from cpcompile.front.call_agreement import CallAgreement
from cpcompile.front.deferred_logits import DeferredLogits
from cpcompile.front.finite_run import FiniteRun
from cpcompile.front.gradient_sums import GradientSync
from cpcompile.front.graph_inputs import GraphInputs
from cpcompile.front.graph_text import GraphText
from cpcompile.front.held_buffers import HeldBuffers
from cpcompile.front.last_call import CallReader, LastCall
from cpcompile.front.memory_plan import planned
from cpcompile.front.one_rank_compiles import one_rank_first
from cpcompile.front.sharded_parameters import Entry, LocalShards, ShardedParameters, local_rows
from cpcompile.front.step_check import StepCheck
from cpcompile.inspect.explain import explanation_of
from cpcompile.inspect.explanation import Explanation
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.ir.plan import Lengths
from cpcompile.memory.ledger import Ledger, ledger_of, takes_gradient
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis, axis_of
from cpcompile.passes.recompute_blocks import blocks_of
from cpcompile.passes.rewrite_dropout import drawing_devices
from cpcompile.runtime.transport.choice import set_transport

_log = logging.getLogger(__name__)


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile a Dynamo graph for this rank. `options` holds `mesh`, perhaps `axis`, and the fields of `cpcompile.Config`.

    Raises:
        CPError: the model cannot be sharded exactly; Dynamo reports it as the cause of its
            `BackendCompilerFailed`.
    """
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"options={options!r} is no mapping: options={{'mesh': mesh, ...}}.")
    given = dict(options or {})
    if "mesh" not in given:
        raise ConfigError(
            'the mesh is missing: torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...}).'
        )
    axis = axis_of(given.pop("mesh"), given.pop("axis", None))
    config = Config.of(given)
    if config.memory:
        raise ConfigError(
            f"memory={config.memory!r} is decided once for a model, and torch.compile may compile it several times: use "
            "cpcompile.apply(model, mesh, memory=...), or memory_budget here."
        )
    if config.constants:
        raise ConfigError(
            f"constants={list(config.constants)!r} are known before Dynamo traces, and torch.compile calls this backend "
            "afterwards: use cpcompile.apply(model, mesh, constants=...)."
        )
    prepare(config, axis)
    sync, inputs = gradient_sync(config, axis), GraphInputs(gm)
    agreement = CallAgreement(config, sync, inputs)
    with agreement.compilation(inputs.read(example_inputs)):
        refuse_parts()
        _torch.guard_on_hooks()
        return Compiled(gm, example_inputs, config, sync, agreement, inputs=inputs)


def prepare(config: Config, axis: Axis) -> None:
    """Check that options and axis fit, and choose how its groups exchange messages; `auto` leaves an earlier choice.

    Raises:
        ConfigError: `usp` without a pair of axes, or symmetric memory without GPUs.
    """
    config.check_axis(axis.inner_size)
    if config.transport == "symmetric" and axis.device_type != "cuda":
        raise ConfigError(
            f"transport='symmetric' needs memory that GPUs share, but the mesh is of {axis.device_type} devices: use 'auto'."
        )
    if config.transport != "auto":
        for group in axis.groups:
            set_transport(group, config.transport)


def refuse_parts() -> None:
    """Refuse, while Dynamo compiles, a function that an uncompiled frame of the model called.

    Without `fullgraph=True`, Dynamo gives up a function that breaks inside a loop or a `with`, runs it as it
    is, and compiles what it calls, each as if it were whole.

    Raises:
        GraphBreakError: with the line that runs uncompiled.
    """
    frame, is_caller = sys._getframe(), False
    while frame.f_back is not None:
        frame = frame.f_back
        name, file = frame.f_code.co_name, frame.f_code.co_filename
        if name == "compile_wrapper" and file.startswith(TORCH):
            return
        is_caller = is_caller or (file.startswith(TORCH) and file.endswith("convert_frame.py"))
        # contextlib runs functions under decorators such as torch.no_grad().
        if is_caller and not file.startswith((TORCH, contextlib.__file__)):
            owner = frame.f_locals.get("self")
            if isinstance(owner, torch.nn.Module) and fsdp.fsdp_modules(owner):
                raise GraphBreakError(FSDP_REMEDY)
            line = traceback.FrameSummary(file, frame.f_lineno, name)
            raise GraphBreakError(break_text("Dynamo gave up the function of this line, which runs uncompiled", [line]))


def gradient_sync(config: Config, axis: Axis) -> GradientSync:
    """Return what sums the gradients of one model; where a wrapper averages parameters, gradients count P-fold until then."""
    return GradientSync(axis, 1 / axis.world_size if config.grad_sync == "mean" else 1.0)


class Compiled:
    """One transformed and compiled graph; called with the flat inputs that Dynamo passes.

    `agreement` compares the ranks before it runs, and what is given to it where `inputs` says how to read that. `last` is
    told of each call.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        config: Config,
        sync: GradientSync,
        agreement: CallAgreement,
        last: LastCall | None = None,
        sharded: ShardedParameters | None = None,
        inputs: GraphInputs | None = None,
    ) -> None:
        axis = sync.axis
        check_devices(example_inputs, axis)
        found = [sharded.entry(x) if sharded is not None else None for x in example_inputs]
        self._sharded, self._entries = sharded, {i: entry for i, entry in enumerate(found) if entry is not None}
        shards = {i: entry.shard for i, entry in self._entries.items()}
        ahead = sharded.largest_unit if sharded is not None else 0
        has_gradients = torch.is_grad_enabled() and any(map(takes_gradient, example_inputs))
        if config.memory and has_gradients:  # what is run without a backward holds little
            prediction = Prediction(gm, example_inputs, axis, shards, ahead, _torch.bytes_of_buckets())
            groups = [name for each in shards.values() for name in (each.group, each.replica_group)]
            config = replace(planned(config, prediction, axis, groups, agreement.least), memory="")
        self.config = config
        self.transformed: Transformed = transform_dynamo_graph(
            gm, example_inputs, config=config, axis=axis, shards=shards
        )
        self._agreement, self._inputs = agreement, inputs
        self._held = HeldBuffers(self.transformed.graph)
        self._drawing = drawing_devices(self.transformed.graph)
        fsdp_groups = {group for shard in shards.values() for group in (shard.group, shard.replica_group)}
        self._text = GraphText.of(self.transformed.graph, axis, fsdp_groups)
        self._num_bounds = len(Lengths.bounds_of(self.transformed.graph))
        self._written = list(parameter_writes(self.transformed.graph))
        self._last, self._reader = LastCall() if last is None else last, CallReader(self.transformed)
        _log.info(
            "%d ranks, layout %s; the model returns %s; of local tokens, cpcompile.unshard makes the whole and "
            "cpcompile.cross_entropy the loss",
            axis.world_size,
            self.transformed.plan.layout,
            "; ".join(map(str, self._reader.outputs)),
        )
        start = time.perf_counter()
        self._plan = plan_of(self.transformed, example_inputs)
        summed_apart = {i for i, shard in shards.items() if shard.sums_axis}
        self._summed = [
            i for i, x in enumerate(example_inputs) if has_summed_gradient(x, config) and i not in summed_apart
        ]
        if axis.world_size == 1:
            self._summed.clear()
        self._sync, self._site = sync, sync.site()
        local = local_inputs(example_inputs, self._entries)
        self._deferred = [DeferredLogits(each, self._summed, sync) for each in defer_outputs(self.transformed.graph)]
        self._gathered = {i for each in self._deferred for i in each.deferred.gathered}
        self._check = None
        if config.check_finite == "step":
            self._check = StepCheck(self.transformed, sync, self._summed, self._site.number, config.inner)
        in_turn = config.one_rank_compiles and axis.world_size > 1
        with one_rank_first(axis, agreement.least) if in_turn else contextlib.nullcontext():
            self._run = compile_inner(
                self.transformed,
                local,
                config,
                self._summed,
                self._site.number,
                shards=shards,
                bytes_ahead=config.prefetch * ahead,
            )
        if config.check_finite == "operators":
            self._run = FiniteRun(self.transformed, axis).run
        seconds, reason = time.perf_counter() - start, _torch.recompilation_reason()
        if self._last.plan is not None and reason:
            say(f"compiled again in {seconds:.0f} s: {reason}")
        if self._last.plan is None and isinstance(self._plan, Explanation):
            self._last.plan = self._plan
            how = "its operators run one by one" if config.inner == "eager" else f"compiled in {seconds:.0f} s"
            say(f"{self._plan.in_brief()}; {how}")

    def __call__(self, *inputs: Any) -> Any:
        self._held.check(inputs)
        told = self._inputs.read(inputs) if self._inputs is not None else None
        self._agreement.before_running(self._text, self._drawing, told)
        given = self._with_local_rows(inputs)
        own = list(given) if self._deferred else given
        step = self._check.begin(given, inputs) if self._check is not None else None
        if self._summed and torch.is_grad_enabled():
            keys = [inputs[i] for i in self._summed]
            of_graph = self._sync(self._site, [given[i] for i in self._summed], keys)
            for i, tensor in zip(self._summed, of_graph, strict=True):
                given[i] = tensor
        results = self._run(*given)
        if self._check is not None and step is not None:
            self._check.ran(step, results)
        if self._deferred:
            made = {each.position: each.of(results, own, inputs) for each in self._deferred}
            results = [made.get(i, x) for i, x in enumerate(results) if i not in self._gathered]
        self._last.plan = self._plan
        self._last.lengths, self._last.outputs = self._reader.lengths(inputs), self._reader.outputs
        self._last.bounds.clear()  # of an earlier call: each is as long as its sequence, and no two need be of one length
        num_own = len(results) - self._num_bounds - len(self._written)
        written, bounds = results[num_own:][: len(self._written)], results[num_own:][len(self._written) :]
        self._last.bounds.update({x.shape[1] - 1: x for x in bounds})
        with torch.no_grad():
            for i, value in zip(self._written, written, strict=True):
                inputs[i].copy_(value)
        return results[:num_own]

    def _with_local_rows(self, inputs: Sequence[Any]) -> list[Any]:
        """Return the inputs with this rank's rows in the place of what stands in for sharded parameters."""
        given = list(inputs)
        if self._sharded is None or not self._entries:
            return given
        entries = [self._sharded.entry(inputs[i]) or entry for i, entry in self._entries.items()]
        rows = LocalShards.apply([e.shard for e in entries], *(e.parameter for e in entries))  # type: ignore[no-untyped-call]
        for i, own in zip(self._entries, rows, strict=True):
            given[i] = own
        return given


def plan_of(transformed: Transformed, inputs: Sequence[Any]) -> Explanation | Exception:
    """Return the plan of a graph for people, and for traces of torch; a model runs whether it can be told or not."""
    try:
        plan = explanation_of(transformed, inputs)
    except Exception as error:
        _log.warning("the plan of this model cannot be told: %s", error)
        return error
    _torch.trace_artifact("cpcompile_plan", lambda: str(plan))
    return plan


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicts the memory of a step with other options."""

    gm: fx.GraphModule
    inputs: Sequence[Any]
    axis: Axis
    shards: Mapping[int, ParameterShard]
    bytes_ahead: int
    buckets: int

    def __call__(self, config: Config) -> tuple[Ledger, int]:
        """Return the ledger, and how many blocks the model has that can be computed again."""
        with stage("predicting the memory of a step"):
            transformed = transform_dynamo_graph(
                self.gm, self.inputs, config=config, axis=self.axis, shards=self.shards
            )
            summed = [i for i, x in enumerate(self.inputs) if has_summed_gradient(x, config) and i not in self.shards]
            found = ledger_of(
                transformed,
                self.inputs,
                config,
                shards=self.shards,
                summed=summed if self.axis.world_size > 1 else (),
                bytes_ahead=config.prefetch * self.bytes_ahead,
                buckets=self.buckets,
            )
        return found, len(blocks_of(transformed.graph))


def local_inputs(example_inputs: Sequence[Any], entries: Mapping[int, Entry]) -> list[Any]:
    """Return example inputs with fake rows of one rank in the place of what stands in for sharded parameters."""
    given = list(example_inputs)
    for i, entry in entries.items():
        rows = local_rows(entry.parameter, entry.shard).requires_grad_(entry.stand_in.requires_grad)
        given[i] = _torch.fake_static_input(rows)
    return given


def has_summed_gradient(value: Any, config: Config) -> bool:
    """Tell whether the gradient of a graph input is summed here: with `mean`, a wrapper averages those of parameters."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad or config.grad_sync == "none":
        return False
    return config.grad_sync == "sum" or not isinstance(value, torch.nn.Parameter)


def check_devices(inputs: Sequence[Any], axis: Axis) -> None:
    """Check that the inputs are on devices of the mesh.

    Raises:
        InputError: a tensor is on another kind of device.
    """
    others = {x.device.type for x in inputs if isinstance(x, torch.Tensor)} - {axis.device_type}
    if "meta" in others:
        raise InputError(
            "the model or its inputs are on the meta device, without values: give the model some "
            f"(model.to_empty(device={axis.device_type!r}), then initialise or load it), or only look at its plan (explain)."
        )
    if others:
        raise InputError(
            f"the mesh is of {axis.device_type} devices, but the model or its inputs are on {', '.join(sorted(others))}: "
            f"move them with .to({axis.device_type!r}), or make the mesh of the other kind."
        )
