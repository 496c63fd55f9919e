"""accelerate: an Accelerator that deals the same batches to the ranks of a group, and a model that its wrappers fit.

accelerator = Accelerator()
model = cpcompile.integrations.accelerate.apply(accelerator, model)          # the added line
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from cpcompile.errors import ConfigError
from cpcompile.front.data import rank_and_replicas

Model = TypeVar("Model", bound=torch.nn.Module)
AxisName = str | tuple[str, str] | None
_SHARED = "_cpcompile_groups"  # the attribute of an Accelerator that has its groups


def apply(
    accelerator: Any, model: Model, mesh: DeviceMesh | None = None, *, axis: AxisName = None, **options: Any
) -> Model:
    """Make `model` context parallel and let `accelerator` deal batches to groups of ranks. Call it before `prepare`.

    Gradients are then those of one device that gets the batches of all groups, in DDP and in FSDP2, with `accumulate`, `backward`
    and `clip_grad_norm_` as always. `gather_for_metrics` has each sample once; `gather` and `reduce` are over all ranks, so that
    their means are right and their sums count each group as often as it has ranks.

    Args:
        accelerator: made without context parallelism of its own.
        model: a module, or a PEFT model, whose base is then made context parallel.
        mesh: of all ranks, or None: all ranks share each sequence.
        axis, options: as for `cpcompile.apply`; `grad_sync` follows from how accelerate wraps the model.

    Returns:
        The same model.

    Raises:
        ConfigError: what the accelerator is set up for does not go together with this; the message says what to change.
    """
    mesh = mesh if mesh is not None else mesh_of_all(accelerator)
    share_batches(accelerator, mesh, axis)
    apply_to(accelerator, model, mesh, axis, options)
    return model


def apply_to(
    accelerator: Any, model: torch.nn.Module, mesh: DeviceMesh, axis: AxisName, options: dict[str, Any]
) -> None:
    """Make a model context parallel, or the base of a PEFT model.

    Raises:
        ConfigError: options that the accelerator decides; prompt learning.
    """
    if "grad_sync" in options:
        raise ConfigError(
            "grad_sync follows from how accelerate wraps the model (DDP averages, FSDP2 adds up): leave it out."
        )
    sync = "mean" if averages(accelerator) else "sum"
    cpcompile.apply(base_of(model), mesh, axis=axis, grad_sync=sync, **options)


def base_of(model: torch.nn.Module) -> torch.nn.Module:
    """Return the model that a PEFT model holds, with its adapters, or the model itself."""
    if not any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft") for cls in type(model).__mro__):
        return model
    base: torch.nn.Module = model.get_base_model()  # type: ignore[operator]
    return base


def mesh_of_all(accelerator: Any) -> DeviceMesh:
    """Return a mesh of one axis of all ranks.

    Raises:
        ConfigError: there is only this process.
    """
    if not torch.distributed.is_initialized():
        raise ConfigError(
            "there is one process only, so no rank to share a sequence with: start the script by torchrun or accelerate launch."
        )
    return init_device_mesh(accelerator.device.type, (torch.distributed.get_world_size(),), mesh_dim_names=("cp",))


def averages(accelerator: Any) -> bool:
    """Tell whether DDP will average gradients over all ranks; FSDP2 is told what to do by cpcompile."""
    return not getattr(accelerator, "is_fsdp2", False)


def refuse(accelerator: Any) -> None:
    """Refuse an Accelerator that would shard, compile or deal in a way of its own.

    Raises:
        ConfigError: with the setting and what to do.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ConfigError("FSDP version 1 hides the parameters of a model: use fsdp_version=2, or DDP.")
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA"):
        raise ConfigError(f"{kind} shards the model and sums gradients itself: use DDP, or FSDP2 (fsdp_version=2).")
    sizes = accelerator.parallelism_config
    for name in ("cp_size", "sp_size", "tp_size"):
        if sizes is not None and getattr(sizes, name, 1) > 1:
            raise ConfigError(
                f"ParallelismConfig({name}={getattr(sizes, name)}) has accelerate shard the sequence or the model too: leave it "
                "out, and name the ranks that share a sequence by mesh= and axis=."
            )
    backend = str(getattr(accelerator.state.dynamo_plugin, "backend", "NO"))
    if not backend.upper().endswith("NO"):
        raise ConfigError(
            f"the model would be compiled twice, by cpcompile and by accelerate's dynamo plugin ({backend}): leave torch_compile "
            "(dynamo_backend) out, and say what compiles by inner='inductor'."
        )
    if accelerator.dispatch_batches:
        raise ConfigError(
            "dispatch_batches=True gives each rank a part of a batch, but the ranks that share a sequence need the same one: "
            "leave it out."
        )


def share_batches(accelerator: Any, mesh: DeviceMesh, axis: str | Sequence[str] | None = None) -> None:
    """Let the data loaders that `accelerator` prepares from now on give the ranks of a group the same batches.

    Groups get different ones. Samplers that shuffle do so alike on all ranks. `gather_for_metrics` has each sample once.

    Raises:
        ConfigError: the accelerator would deal in another way, or has prepared a loader already.
    """
    refuse(accelerator)
    rank, replicas = rank_and_replicas(mesh, axis)
    if getattr(accelerator, _SHARED, (rank, replicas)) != (rank, replicas):
        raise ConfigError("this Accelerator deals to groups of another mesh already: make a new one.")
    if hasattr(accelerator, _SHARED):
        return
    if accelerator._dataloaders:
        raise ConfigError(
            "the Accelerator has prepared a data loader already, which deals each rank a batch of its own: call this before "
            "prepare."
        )
    first = first_of_groups(mesh, rank, replicas)
    own = type(accelerator)

    @functools.wraps(own.prepare_data_loader)
    def prepare_data_loader(data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(data_loader, "_is_accelerate_prepared", False):
            share_shuffle(data_loader)
        return own.prepare_data_loader(_Dealer(accelerator, rank, replicas), data_loader, *args, **kwargs)

    @functools.wraps(own.gather_for_metrics)
    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        if use_gather_object or not holds_tensors_only(
            input_data
        ):  # what the ranks hold is joined, so others hold nothing
            mine = input_data if torch.distributed.get_rank() in first else []
            return own.gather_for_metrics(accelerator, mine, use_gather_object=True)
        return own.gather_for_metrics(_Gatherer(accelerator, first), input_data)

    accelerator.prepare_data_loader = prepare_data_loader
    accelerator.gather_for_metrics = gather_for_metrics
    setattr(accelerator, _SHARED, (rank, replicas))


def first_of_groups(mesh: DeviceMesh, rank: int, replicas: int) -> list[int]:
    """Return the first rank of each group, in the order of the data that they get. Collective."""
    found: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, rank)
    return [found.index(each) for each in range(replicas)]


def holds_tensors_only(data: Any) -> bool:
    """Tell whether accelerate gathers `data` as tensors."""
    from accelerate.utils import recursively_apply

    try:
        recursively_apply(lambda x: x, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def share_shuffle(data_loader: Any) -> None:
    """Give a sampler that shuffles a generator that is seeded alike on all ranks. Collective if there is one without."""
    for sampler in (data_loader.sampler, getattr(data_loader.batch_sampler, "sampler", None)):
        if isinstance(sampler, torch.utils.data.RandomSampler) and sampler.generator is None:
            seed = [int(torch.empty((), dtype=torch.int64).random_().item())]
            torch.distributed.broadcast_object_list(seed, src=0)
            sampler.generator = torch.Generator()
            sampler.generator.manual_seed(seed[0])


class _Dealer:
    """An Accelerator that knows groups as processes: what `prepare_data_loader` reads of it."""

    def __init__(self, accelerator: Any, rank: int, replicas: int) -> None:
        self._accelerator, self.process_index, self.num_processes = accelerator, rank, replicas
        self.dispatch_batches = False  # left out, accelerate would deal out the batches of iterable data sets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def _prepare_device_mesh(self) -> None:
        """Return no mesh: from that of FSDP accelerate would count processes again."""


class _Gatherer:
    """An Accelerator that gathers from one rank of each group: what `gather_for_metrics` reads of it."""

    def __init__(self, accelerator: Any, first: Sequence[int]) -> None:
        self._accelerator, self._first = accelerator, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, tensors: Any) -> Any:
        """Return what the first ranks of all groups hold."""
        from accelerate.utils import recursively_apply

        world_size = torch.distributed.get_world_size()

        def once(gathered: torch.Tensor) -> torch.Tensor:
            blocks = gathered.tensor_split(world_size)
            return torch.cat([blocks[rank] for rank in self._first])

        return recursively_apply(once, self._accelerator.gather(tensors))
