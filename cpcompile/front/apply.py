"""The front door: `apply` makes a model context parallel in place, `remove` undoes it, `shard` and `unshard` move tensors."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from cpcompile._torch import fsdp
from cpcompile.balance.layout import local_length
from cpcompile.capture.dynamo import by_name, compile_whole, token_length, uncompiled
from cpcompile.errors import ConfigError
from cpcompile.front.backend import Compiled, gradient_sync, prepare
from cpcompile.front.call_agreement import CallAgreement
from cpcompile.front.generation import Generation
from cpcompile.front.last_call import LastCall
from cpcompile.front.module_state import ModuleState
from cpcompile.front.sharded_parameters import ShardedParameters, adopt
from cpcompile.inspect.explanation import Explanation
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis, axis_of

Model = TypeVar("Model", bound=torch.nn.Module)
# Classes of wrappers by name, so that none of their packages is imported: where they are from, and what to do instead.
WRAPPERS = {
    "DistributedDataParallel": (
        ("torch",),
        'call cpcompile.apply(model.module, mesh, grad_sync="mean"), or apply before wrapping: DDP averages the gradients',
    ),
    "DataParallel": (("torch",), "it runs all devices in one process, so start one for each, by torchrun"),
    "FullyShardedDataParallel": (("torch",), "version 1 of FSDP hides the parameters: use fully_shard (FSDP2)"),
    "PeftModel": (("peft",), "call cpcompile.apply(model.get_base_model(), mesh), which holds the adapters"),
    "LightningModule": (
        ("lightning", "pytorch_lightning"),
        "its steps call the model, so call cpcompile.apply on that, or use cpcompile.integrations.lightning",
    ),
    "DeepSpeedEngine": (("deepspeed",), "it shards parameters and sums gradients itself: use fully_shard (FSDP2)"),
}
COMPILED_ALREADY = (
    "cpcompile.apply compiles the model itself (the option inner= says by what): compile nothing around it"
)


def apply(model: Model, mesh: DeviceMesh, *, axis: str | tuple[str, str] | None = None, **options: Any) -> Model:
    """Make `model` context parallel, in place.

    Each rank of the axis calls the model as a single-device script does, with the whole batch. The loss is
    that of the whole batch on every rank, and after `loss.backward()` every parameter's gradient is that of
    the single-device model. Sequence-shaped outputs (logits) hold this rank's tokens, or all with
    `outputs="full"`; `unshard` joins them. Parameters, state-dict names, call signature and output type stay.

    Args:
        model: any module that traces as one graph.
        mesh: a 1-D mesh of the ranks that share each sequence, or a larger one with `axis`.
        axis: name of the context-parallel axis of `mesh`, or of two, `(ring axis, ulysses axis)` in the order of the mesh: the
            ranks of both together share each sequence, and `strategy="usp"` exchanges heads along the second.
        options: the fields of `cpcompile.Config`: `strategy`, `balancer`, `inner`, `outputs`, `grad_sync`,
            ...

    Returns:
        The same object.

    Raises:
        ConfigError: an option, the mesh or the axis does not fit.
        CPError: at the first call: the model cannot be sharded exactly; the message has the line, the reason
            and the remedy.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"cpcompile.apply takes a torch.nn.Module, not {type(model).__name__}.")
    refuse_wrapper(model)
    if parallel_parts(model):
        raise ConfigError("this model is context parallel already: call cpcompile.remove(model) first.")
    config, chosen = Config.of(options), axis_of(mesh, axis)
    prepare(config, chosen)
    inner = uncompiled(model)
    inner.forward = forward = ParallelForward(inner, inner.forward, config, chosen)
    Generation.replace(inner)
    forward.on_load = inner.register_load_state_dict_post_hook(weights_loaded)  # type: ignore[no-untyped-call]
    return model


def remove(model: Model) -> Model:
    """Undo `apply`: the model is the single-device one again. Returns the same object."""
    parallel = parallel_forward(model)
    inner = parallel.model
    if inner.__dict__["forward"] is not parallel:
        raise ConfigError(
            "another library has replaced the forward of this model since cpcompile.apply: undo that first "
            "(accelerator.unwrap_model(model, keep_fp32_wrapper=False), where accelerate casts what it returns)."
        )
    parallel.release()
    forward = parallel.__wrapped__
    if parallel.on_load is not None:
        parallel.on_load.remove()
    Generation.remove(inner)
    del inner.__dict__["forward"]
    if getattr(forward, "__self__", None) is not inner:
        inner.forward = forward  # another library had replaced it before `apply` did
    return model


def no_sync(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Return a context in which backward keeps gradients back; the next one outside delivers them too, summed."""
    return parallel_forward(model).sync.no_sync()


@contextlib.contextmanager
def whole_outputs(model: torch.nn.Module) -> Iterator[None]:
    """Surround calls whose sequence-shaped outputs are to come back whole, whatever the option `outputs` says."""
    forward = parallel_forward(model)
    before, forward.outputs = forward.outputs, "full"
    try:
        yield
    finally:
        forward.outputs = before


def parallel_forward(model: torch.nn.Module) -> ParallelForward:
    """Return what `apply` put in place of the forward of the model, or of the one that it holds (DDP and others hold one).

    Raises:
        ConfigError: there is none, or several.
    """
    own = unwrapped(uncompiled(model).__dict__.get("forward"))
    if own is not None:
        return own
    found = parallel_parts(model)
    if not found:
        raise ConfigError("this model is not context parallel: call cpcompile.apply(model, mesh) first.")
    if len(found) > 1:
        names = {id(module): name for name, module in model.named_modules()}
        paths = ", ".join(names.get(id(forward.model)) or "the model" for forward in found)
        raise ConfigError(
            f"this module holds {len(found)} context-parallel models: pass the one that is meant ({paths})."
        )
    return found[0]


def parallel_parts(model: torch.nn.Module) -> list[ParallelForward]:
    """Return what `apply` put into the model and into those that it holds."""
    forwards = (unwrapped(module.__dict__.get("forward")) for module in model.modules())
    return list({id(forward): forward for forward in forwards if forward is not None}.values())


def unwrapped(forward: Any) -> ParallelForward | None:
    """Return what `apply` put in place of a forward that others may have wrapped since, as accelerate does for autocast."""
    while not isinstance(forward, ParallelForward):
        bound = getattr(forward, "__func__", None)
        forward = bound if isinstance(bound, ParallelForward) else getattr(forward, "__wrapped__", None)
        if forward is None:
            return None
    return forward


def refuse_wrapper(model: torch.nn.Module) -> None:
    """Refuse a module whose forward is not that of a model but calls one.

    Raises:
        ConfigError: with what to call instead.
    """
    names = {cls.__name__: cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    remedies = {name: text for name, (package, text) in WRAPPERS.items() if names.get(name) in package}
    for name, remedy in remedies.items():
        raise ConfigError(f"{name} is a wrapper around the model: {remedy}.")


def weights_loaded(model: torch.nn.Module, keys: object) -> None:
    """Have the ranks' weights compared again. A function of the module, so that copies of a model have it too."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, ParallelForward):
        forward.agreement.weights_changed()


class ParallelForward:
    """What `apply` puts in place of a model's forward: compares the ranks, then runs the compiled, transformed program."""

    def __init__(self, model: torch.nn.Module, forward: Callable[..., Any], config: Config, axis: Axis) -> None:
        self.model, self.config, self.axis = model, config, axis
        self.length = 0  # tokens of the last call
        self.layout = ""  # chosen when the model is first called
        self.last = LastCall()
        self._is_untouched = False
        self._has_labels = False  # that were compared over the ranks
        self.__wrapped__ = forward  # `inspect.signature(model.forward)` stays that of the model
        self.sync = gradient_sync(config, axis)
        self.outputs = config.outputs  # of the coming calls
        self._programs: dict[str, Callable[..., Any]] = {}  # by what they return
        self.agreement = CallAgreement(config, self.sync, ModuleState(model))
        self.on_load: RemovableHandle | None = None
        self._sharded: ShardedParameters | None = None
        self._adopted: type | None = None  # the class of the model when FSDP's modules were looked for

    def _program(self) -> Callable[..., Any]:
        """Return the compiled model, whose outputs are as they are wanted now."""
        if self.outputs not in self._programs:
            self._programs[self.outputs] = compile_whole(
                self.__wrapped__, partial(self._backend, self.outputs), self.config
            )
        return self._programs[self.outputs]

    def _backend(self, outputs: str, gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        # The first graph chooses the layout for all: `unshard` must know it whichever graph ran last.
        config = replace(self.config, balancer=self.layout or self.config.balancer, outputs=outputs)
        compiled = Compiled(
            gm, example_inputs, config, self.sync, self.agreement, last=self.last, sharded=self._sharded
        )
        self.layout = compiled.transformed.plan.layout
        # What fits is decided once: a later graph on one rank alone could not ask the others.
        plan = {name: getattr(compiled.config, name) for name in ("memory", "memory_budget", "tile")}
        self.config = replace(self.config, **plan)
        return compiled

    def compares_labels(self) -> bool:
        """Tell whether labels that come after a call are to be compared over the ranks, now."""
        before, self._has_labels = self._has_labels, True
        return self.config.check_inputs == "always" or (self.config.check_inputs == "first" and not before)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelForward:
        """Return the same for a copy of the model, which has parameters of its own."""
        model, forward = copy.deepcopy((self.model, self.__wrapped__), memo)
        return ParallelForward(model, forward, self.config, self.axis)

    def __reduce__(self) -> Any:
        raise ConfigError(
            "a context-parallel model cannot be pickled: its process group exists in this job only. Save "
            "model.state_dict(), whose names apply leaves alone, or call cpcompile.remove(model) first."
        )

    # torch.compile around the model leaves this call alone, which compiles the model itself.
    @torch.compiler.disable(reason=COMPILED_ALREADY)  # type: ignore[untyped-decorator, no-untyped-call]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and args[0] is self.model:
            args = args[1:]  # accelerate.unwrap_model makes a method of what it finds
        if self._is_untouched:
            return self.__wrapped__(*args, **kwargs)
        with self._plain_modules(), self.agreement.call():
            named = by_name(self.__wrapped__, kwargs, *args, beside=self.config.told_by)
            self.agreement.before_compiling(named)
            self.length = token_length(named, self.config, mark_dynamic=self.config.dynamic) or 0
            return self._program()(**named)

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Return a context in which calls run the model as it was."""
        before, self._is_untouched = self._is_untouched, True
        try:
            with contextlib.nullcontext() if self._sharded is None or before else self._sharded.outside_call():
                yield
        finally:
            self._is_untouched = before
            fsdp.reshard(self.model)

    def _plain_modules(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which modules that `fully_shard` wrapped, before or after `apply`, are plain ones."""
        if self._adopted is not type(self.model):
            self._adopted = type(self.model)
            self._sharded = adopt(self.model, self.config, self.axis) or self._sharded
        return contextlib.nullcontext() if self._sharded is None else self._sharded.inside_call()

    def release(self) -> None:
        """Give the modules that `fully_shard` wrapped their own hooks back."""
        if self._sharded is not None:
            self._sharded.release()


def explanation(model: torch.nn.Module) -> Explanation:
    """Return the plan that the last call of a context-parallel model ran by: `print` it, or read its fields.

    It has neither the code of the graphs nor the memory of a step, which `cpcompile.explain` tells.

    Args:
        model: the context-parallel model, or a wrapper that holds it.

    Raises:
        ConfigError: the model is not context parallel, or was not called yet.
    """
    plan = _called(model).last.plan
    if isinstance(plan, Exception):
        raise ConfigError(f"the plan of this model cannot be told: {plan}. Please report it.") from plan
    if plan is None:
        raise ConfigError("the last call of this model was not compiled: call it first.")
    return plan


def unshard(tensor: torch.Tensor, model: torch.nn.Module, *, dim: int = 1, length: int | None = None) -> torch.Tensor:
    """Return the whole of a sequence-shaped output, in the user's token order, on every rank. Collective; differentiable.

    Where the layout follows documents, they are those of the last call. A loss needs no whole logits: `cpcompile.cross_entropy`.

    Every rank is expected to compute the same from it and to call backward, as with `outputs="full"`: each
    back-propagates its share, so that the gradients are those of one device.

    Args:
        tensor: this rank's tokens, as the model returned them.
        model: the context-parallel model, or a wrapper that holds it (DDP, PEFT, a Lightning module).
        dim: the dim of the tokens.
        length: tokens of the whole sequence; by default those of the last call, or of the output that `tensor` can only be.
    """
    forward, at = _called(model), dim % tensor.dim()
    whole = length if length is not None else output_length(forward, tensor, at)
    expected = local_length(whole, forward.axis.world_size, forward.layout)
    if tensor.shape[at] != expected:
        raise ConfigError(
            f"dim {dim} has {tensor.shape[at]} token slots, but a rank's part of {whole} tokens has {expected}: "
            "pass the dim of the tokens, and length= if this is not an output of the last call."
        )
    share = torch.ops.cpcompile.scale_gradient(tensor, 1 / forward.axis.world_size)
    out: torch.Tensor = torch.ops.cpcompile.gather_tokens(share, at, 1, *axis_arguments(forward, whole))
    return out


def output_length(forward: ParallelForward, tensor: torch.Tensor, at: int) -> int:
    """Return how many tokens the whole of a local output has: those of the last call, or more where sequences were joined.

    Raises:
        ConfigError: outputs of several lengths have this shape.
    """
    more = {output.more_tokens for output in forward.last.outputs if output.dim == at}
    lengths = {forward.length, *(forward.length + n for n in more if n is not None)}
    fitting = [n for n in lengths if local_length(n, forward.axis.world_size, forward.layout) == tensor.shape[at]]
    if len(fitting) > 1:
        raise ConfigError(
            f"dim {at} has {tensor.shape[at]} token slots, a rank's part of {' and of '.join(map(str, sorted(fitting)))} tokens: "
            "the model returns both, so pass length=."
        )
    return fitting[0] if fitting else forward.length


def shard(tensor: torch.Tensor, model: torch.nn.Module, *, dim: int = 1, padding: float | None = None) -> torch.Tensor:
    """Return this rank's tokens of a whole tensor (labels, weights), in the order of the model's local outputs. Differentiable.

    Where the layout follows documents, they are those of the last call, so that it has to be one on the same batch.

    Where the length does not divide, the last slots of some ranks are padding: they repeat the last token, or
    hold `padding`. The loss of most models is `cpcompile.cross_entropy`. Another one sums over the tokens of the rank and
    divides by the whole count; the gradients are then those of one device, and the losses of the ranks add up to the loss:

        mine = cpcompile.shard(labels, model, padding=-100)
        total = F.cross_entropy(logits.flatten(0, 1), mine.flatten(), reduction="sum")
        (total / (labels != -100).sum()).backward()

    Args:
        tensor: the whole tensor, the same on every rank.
        model: the context-parallel model.
        dim: the dim of the tokens.
        padding: what padding slots hold, e.g. the label that a loss ignores.
    """
    forward, at = _called(model), dim % tensor.dim()
    axis = axis_arguments(forward, tensor.shape[at])
    out: torch.Tensor = torch.ops.cpcompile.shard_tokens(tensor, at, 1, *axis)
    return out if padding is None else torch.ops.cpcompile.fill_padding(out, at, 1, padding, 0, 0, *axis)


def axis_arguments(forward: ParallelForward, length: int) -> tuple[Any, ...]:
    """Return the last arguments of the operators on tokens, as in the last call of the model."""
    known = forward.last.bounds
    bounds = (known[length],) if length in known else ()
    return length, forward.layout, forward.axis.world_size, forward.axis.group, *bounds


def _called(model: torch.nn.Module) -> ParallelForward:
    forward = parallel_forward(model)
    if not forward.layout:
        raise ConfigError(
            "the plan and the layout are made when the model is first called: call the model before this."
        )
    return forward
