"""FSDP2 from inside: what `fully_shard` put on a module, and how to take it off and put it back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

_HOME = "torch.distributed.fsdp._fully_shard"
Hook = Callable[..., Any]
Hooks = dict[int, Hook]
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


@dataclass(frozen=True, slots=True)
class FsdpParameter:
    """A parameter that `fully_shard` manages.

    Attributes:
        sites: the modules that hold it, and its name there.
        unit: the wrapped module with whose parameters it is gathered.
        policy: its mixed precision.
        reshards: it is sharded again after forward.
        divide_factor: what the user divides gradients by, None for the number of ranks.
        obstacle: why it cannot be gathered inside a graph, or ''.
    """

    sites: tuple[tuple[nn.Module, str], ...]
    unit: nn.Module
    policy: MixedPrecisionPolicy
    reshards: bool
    divide_factor: float | None
    obstacle: str


def fsdp_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules, the model included, that `fully_shard` wrapped."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Give back what forwards without a backward left gathered."""
    for module in fsdp_modules(model):
        module.reshard()  # type: ignore[operator]


def fsdp_parameters(model: nn.Module) -> Iterator[FsdpParameter]:
    """Yield what `fully_shard` manages in the model."""
    seen = set[int]()
    for module in fsdp_modules(model):
        state = _state_of(module)
        if id(state) in seen:
            continue
        seen.add(id(state))
        for group in _groups_of(state):
            is_root_default = module is model and state._auto_reshard_after_forward
            reshards = group.post_forward_mesh_info is not None and not is_root_default
            for parameter in group.fsdp_params:
                info = parameter._module_info
                shared = zip(info.shared_modules, info.shared_param_names, strict=True)
                yield FsdpParameter(
                    sites=((info.module, info.param_name), *shared),
                    unit=module,
                    policy=parameter.mp_policy,
                    reshards=reshards,
                    divide_factor=group.gradient_divide_factor,
                    obstacle=_obstacle(parameter),
                )


def _obstacle(parameter: Any) -> str:
    if parameter.offload_to_cpu:
        return "CPUOffloadPolicy keeps it in host memory"
    if getattr(parameter, "_extensions_data", None) is not None:
        return "its tensor class has hooks of its own for the gather (fsdp_pre_all_gather)"
    return ""


def is_fsdp_hook(hook: Hook) -> bool:
    """Tell whether `fully_shard` registered a hook."""
    return str(getattr(hook, "__module__", "")).startswith(_HOME)


@dataclass(slots=True)
class FsdpDress:
    """What `fully_shard` put on a module beside its parameters, a class and hooks: takes it off and puts it back.

    In place of FSDP's hooks are such that only cast inputs and output as its policy says, where it says so.
    """

    module: nn.Module
    dressed: type
    plain: type
    casts: tuple[Hook | None, Hook | None]

    @classmethod
    def of(cls, module: nn.Module) -> FsdpDress:
        """Return that of a wrapped module."""
        policy = _state_of(module)._mp_policy
        plain = next(base for base in type(module).__mro__[1:] if not issubclass(base, FSDPModule))
        input_dtype = policy.param_dtype if policy.cast_forward_inputs else None
        return cls(module, type(module), plain, (_input_cast(input_dtype), _output_cast(policy.output_dtype)))

    def undress(self) -> tuple[Hooks, Hooks]:
        """Make the module the plain one; returns the hooks that it had."""
        had = self.module._forward_pre_hooks, self.module._forward_hooks
        self.replace_hooks()
        self.module.__class__ = self.plain
        return had

    def dress(self, hooks: tuple[Hooks, Hooks]) -> None:
        """Undo `undress`."""
        self.module.__class__ = self.dressed
        self.module._forward_pre_hooks, self.module._forward_hooks = hooks

    def replace_hooks(self) -> list[tuple[str, int, Hook]]:
        """Replace FSDP's hooks; returns them with the name of their dict and their number."""
        taken = []
        for name, cast in zip(_HOOKS, self.casts, strict=True):
            hooks = getattr(self.module, name)
            taken += [(name, i, hook) for i, hook in hooks.items() if is_fsdp_hook(hook)]
            kept = ((i, cast if is_fsdp_hook(hook) else hook) for i, hook in hooks.items())
            setattr(self.module, name, OrderedDict((i, hook) for i, hook in kept if hook is not None))
        return taken

    def restore_hooks(self, taken: list[tuple[str, int, Hook]]) -> None:
        """Undo `replace_hooks`."""
        for name, i, hook in taken:
            hooks = getattr(self.module, name)
            is_new = i not in hooks
            hooks[i] = hook
            if is_new and name == _HOOKS[0]:
                hooks.move_to_end(i, last=False)

    def withdraw(self) -> None:
        """Undo what FSDP's hook before a forward has done, if it ran: the parameters are sharded again."""
        from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

        state = _state_of(self.module)
        if state._training_state != TrainingState.FORWARD:
            return
        for group in _groups_of(state):
            group._to_sharded()
            group._training_state = TrainingState.IDLE
            if (held := group.comm_ctx.all_gather_state) is not None:  # the gathered bytes, kept for the next gather
                group._wait_all_gather_streams_on_event(held.event)
                group.comm_ctx.all_gather_state = None
        state._training_state = TrainingState.IDLE
        state._state_ctx.iter_forward_root = None


def _state_of(module: nn.Module) -> Any:
    return module._get_fsdp_state()  # type: ignore[operator]


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)  # one until torch 2.12
    return [group for group in (groups if groups is not None else [state._fsdp_param_group]) if group is not None]


def _input_cast(dtype: torch.dtype | None) -> Hook | None:
    def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _cast((args, kwargs), dtype)

    return cast_inputs if dtype is not None else None


def _output_cast(dtype: torch.dtype | None) -> Hook | None:
    def cast_output(module: nn.Module, args: Any, output: Any) -> Any:
        return _cast(output, dtype)

    return cast_output if dtype is not None else None


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    """Return values whose floating-point tensors are of another dtype."""

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(cast, values)


def local_of(parameter: DTensor) -> torch.Tensor:
    """Return what this rank holds of a parameter, without autograd."""
    return parameter._local_tensor.detach()
