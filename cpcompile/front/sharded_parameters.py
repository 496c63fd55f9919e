"""Sharded parameters: a model that `fully_shard` wrapped runs as one graph, which gathers its parameters itself.

FSDP2 gathers in hooks, which no graph can hold. Inside a compiled call its modules are therefore the plain ones: without its
hooks and classes, and with stand-ins in the place of its parameters, which have the whole shape and no memory. The graph gets the
rows of this rank instead, and an operator that gathers them; the adjoint of that gives each rank its rows of the gradient.
Outside of the call all is FSDP's as before, so that the optimizer, clipping and checkpoints see its DTensors.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.weak import WeakIdKeyDictionary

from cpcompile._torch import fsdp
from cpcompile.errors import ConfigError
from cpcompile.front.parameter_group import parameter_group
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis


@dataclass(slots=True)
class Entry:
    """A sharded parameter: where it is, its unit of `fully_shard`, its value now, what stands in for it, how it is sharded."""

    sites: tuple[tuple[nn.Module, str], ...]
    unit: nn.Module
    parameter: DTensor
    stand_in: nn.Parameter
    shard: ParameterShard

    def look_up(self) -> None:
        """Take the parameter as it is now: loading may have put another in its place, or the user frozen it."""
        module, name = self.sites[0]
        value: Any = module._parameters[name]
        self.parameter = value
        if self.stand_in.requires_grad != value.requires_grad:
            self.stand_in.requires_grad_(value.requires_grad)


class ShardedParameters:
    """The parameters of a model that FSDP2 shards."""

    def __init__(self, model: nn.Module, config: Config, axis: Axis) -> None:
        """Adopt what `fully_shard` wrapped.

        Raises:
            ConfigError: a parameter is sharded in a way that the graph cannot gather; its name and the remedy are said.
        """
        self.model = model
        self.dresses = [fsdp.FsdpDress.of(module) for module in fsdp.fsdp_modules(model)]
        self.own = [dress for dress in self.dresses if dress.module is model]  # its hooks run around the compiled call
        for dress in self.own:
            dress.withdraw()
        paths = {module: path for path, module in model.named_modules()}
        self.entries = [entry_of(found, paths, config, axis) for found in fsdp.fsdp_parameters(model)]
        self.by_stand_in: WeakIdKeyDictionary = WeakIdKeyDictionary({e.stand_in: e for e in self.entries})
        refuse_others(paths, self.entries)
        self._taken = [dress.replace_hooks() for dress in self.own]

    @property
    def largest_unit(self) -> int:
        """The bytes of the largest module that is gathered at once; of the model itself, if `fully_shard` wrapped no other."""
        sizes = collections.Counter[nn.Module]()
        for entry in self.entries:
            sizes[entry.unit] += entry.shard.num_bytes
        inner = [size for unit, size in sizes.items() if unit is not self.model]
        return max(inner or sizes.values(), default=0)

    def release(self) -> None:
        """Give the model its own hooks back."""
        for dress, taken in zip(self.own, self._taken, strict=True):
            dress.restore_hooks(taken)

    @contextlib.contextmanager
    def outside_call(self) -> Iterator[None]:
        """Give the model its own hooks back for a while, in which it is called as without cpcompile."""
        self.release()
        try:
            yield
        finally:
            self._taken = [dress.replace_hooks() for dress in self.own]

    @contextlib.contextmanager
    def inside_call(self) -> Iterator[None]:
        """Make the modules the plain ones, with stand-ins for their sharded parameters."""
        hooks = [dress.undress() for dress in self.dresses]
        held = [(module, name, module._parameters[name]) for e in self.entries for module, name in e.sites]
        for entry in self.entries:
            entry.look_up()
            for module, name in entry.sites:
                module._parameters[name] = entry.stand_in
        try:
            yield
        finally:
            for module, name, parameter in held:
                module._parameters[name] = parameter
            for dress, had in zip(self.dresses, hooks, strict=True):
                dress.dress(had)

    def entry(self, value: Any) -> Entry | None:
        """Return what an input of the graph stands in for, None for one that is itself."""
        return self.by_stand_in.get(value) if isinstance(value, torch.Tensor) else None  # type: ignore[no-untyped-call]


def adopt(model: nn.Module, config: Config, axis: Axis) -> ShardedParameters | None:
    """Return the parameters of a model that FSDP2 shards, None where there are none; other sharded ones are refused."""
    if fsdp.fsdp_modules(model) or any(is_dtensor(parameter) for parameter in model.parameters()):
        return ShardedParameters(model, config, axis)
    return None


def entry_of(found: fsdp.FsdpParameter, paths: Mapping[nn.Module, str], config: Config, axis: Axis) -> Entry:
    """Return the entry of a parameter that FSDP manages."""
    (module, name), *_ = found.sites
    parameter: Any = module._parameters[name]
    path = path_of(paths, module, name)
    if found.obstacle:
        raise ConfigError(
            f"the parameter {path} cannot be gathered inside the compiled step: {found.obstacle}. Call fully_shard without it."
        )
    shard = replace(shard_of(path, parameter, found, config, axis), unit=paths.get(found.unit, ""))
    return Entry(found.sites, found.unit, parameter, stand_in_for(parameter, shard), shard)


def shard_of(path: str, parameter: DTensor, found: fsdp.FsdpParameter, config: Config, axis: Axis) -> ParameterShard:
    """Return how a parameter is sharded, and by what its gradients are divided.

    Raises:
        ConfigError: it is sharded otherwise than FSDP2 does on a mesh of one axis or two, or its ranks and the context-parallel
            axis overlap in part.
    """
    mesh, placements = parameter.device_mesh, parameter.placements
    is_plain = isinstance(placements[-1], Shard) and all(isinstance(p, Replicate) for p in placements[:-1])
    if not is_plain or mesh.ndim > 2:
        raise ConfigError(
            f"the parameter {path} is sharded as {tuple(map(str, placements))} on a mesh of {mesh.mesh_dim_names}. Only what "
            "fully_shard does on one axis, or on two with replicas on the first, can be gathered inside the compiled step: leave "
            "out parallelize_module, or flatten the mesh (mesh['dp', 'cp']._flatten())."
        )
    ranks, together = set(mesh.mesh.flatten().tolist()), set(axis.ranks)
    common = len(ranks & together)
    if common not in (1, len(together)):
        raise ConfigError(
            f"FSDP shards the parameter {path} over the ranks {sorted(ranks)}, which hold {common} of the {len(together)} ranks "
            f"{sorted(together)} that share a sequence. Shard it over all of these (the flattened mesh of data and context "
            "parallelism, as a rule) or over data-parallel ranks only."
        )
    group = mesh.get_group(mesh.ndim - 1)
    replicas = mesh.get_group(0) if mesh.ndim == 2 else None
    total = float(len(ranks))
    averaged = total if config.grad_sync == "mean" else total / common
    dtype = found.policy.param_dtype if parameter.dtype.is_floating_point else None
    return ParameterShard(
        shape=tuple(parameter.shape),
        dim=placements[-1].dim,  # type: ignore[attr-defined]
        world_size=group.size(),
        group=str(parameter_group(group, axis).group_name),
        replicas=replicas.size() if replicas is not None else 1,
        replica_group=replicas.group_name if replicas is not None else "",
        dtype=dtype or parameter.dtype,
        stored_dtype=parameter.dtype,
        reduce_dtype=found.policy.reduce_dtype or dtype or parameter.dtype,
        divisor=found.divide_factor or averaged,
        stays_whole=not found.reshards,
        sums_axis=common == len(together),
    )


def stand_in_for(parameter: DTensor, shard: ParameterShard) -> nn.Parameter:
    """Return a parameter of the whole shape whose memory is given back."""
    whole = torch.empty(shard.shape, dtype=shard.dtype, device=parameter.device)
    whole.untyped_storage().resize_(0)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def refuse_others(paths: Mapping[nn.Module, str], entries: Sequence[Entry]) -> None:
    """Refuse DTensors that are not FSDP's.

    Raises:
        ConfigError: with the names of those parameters.
    """
    known = {(id(module), name) for entry in entries for module, name in entry.sites}
    others = [
        path_of(paths, module, name)
        for module in paths
        for name, value in module._parameters.items()
        if is_dtensor(value) and (id(module), name) not in known
    ]
    if others:
        raise ConfigError(
            f"{len(others)} parameter(s) are DTensors that fully_shard does not manage ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}): tensor parallelism beside context parallelism is not supported yet. Leave "
            "out parallelize_module and distribute_module, and shard with fully_shard."
        )


def is_dtensor(value: Any) -> bool:
    """Tell whether a parameter is a DTensor, which its type does not say."""
    return isinstance(value, DTensor)


def path_of(paths: Mapping[nn.Module, str], module: nn.Module, name: str) -> str:
    """Return the name of a parameter in the model, whose modules `paths` names."""
    path = paths.get(module, type(module).__name__)
    return f"{path}.{name}" if path else name


class LocalShards(torch.autograd.Function):
    """From sharded parameters to the rows that the graph takes, padding included; gradients become DTensors on the way back."""

    @staticmethod
    def forward(ctx: Any, shards: Sequence[ParameterShard], *parameters: DTensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.shards = shards
        ctx.layouts = [(p.device_mesh, p.placements, p.shape, p.stride(), p.to_local().shape) for p in parameters]
        rows = tuple(local_rows(p, shard) for p, shard in zip(parameters, shards, strict=True))
        ctx.mark_non_differentiable(*[x for x, p in zip(rows, parameters, strict=True) if not p.requires_grad])
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        found: list[DTensor | None] = []
        for grad, shard, layout in zip(grads, ctx.shards, ctx.layouts, strict=True):
            if grad is None:
                found.append(None)
                continue
            mesh, placements, shape, stride, local = layout
            own = grad.narrow(shard.dim, 0, local[shard.dim])
            found.append(DTensor.from_local(own, mesh, placements, run_check=False, shape=shape, stride=stride))
        return None, *found


def local_rows(parameter: DTensor, shard: ParameterShard) -> torch.Tensor:
    """Return the rows of this rank, padded to as many as every rank has, without autograd."""
    local = fsdp.local_of(parameter)
    missing = shard.num_rows - local.shape[shard.dim]
    if not missing:
        return local
    pads = [0, 0] * (local.dim() - shard.dim - 1) + [0, missing]
    return torch.constant_pad_nd(local, pads)
