"""accelerate, told that another package shares the sequence: batches by group, models left as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, RandomSampler

from cpcompile.errors import ConfigError
from cpcompile.runtime import shared_seed

_originals: list[tuple[Any, str, Any]] = []


def patch_accelerate() -> None:
    """Let `Accelerator(parallelism_config=ParallelismConfig(cp_size=...))` prepare data and models for this module.

    To be called before the Accelerator is made; undone by `unpatch_accelerate`. All ranks of a `cp` group get the same batches,
    also of iterable datasets and when shuffled, and groups get different ones. Models are left as they are: accelerate would
    replace their masks, or refuse windows. On CPUs accelerate wraps the model in DDP, over all ranks.

    Raises:
        ConfigError: accelerate is not installed, or has no context parallelism.
    """
    if _originals:
        return
    try:
        from accelerate import accelerator as module
        from accelerate.parallelism_config import ParallelismConfig
    except ImportError as error:
        raise ConfigError(
            f"accelerate with a ParallelismConfig is needed ({error}): pip install 'accelerate>=1.10'."
        ) from error
    if not hasattr(module.Accelerator, "_prepare_cp") or not hasattr(ParallelismConfig, "_validate_accelerator"):
        raise ConfigError("this accelerate has no context parallelism: pip install 'accelerate>=1.10'.")
    _replace(module, "prepare_data_loader", _prepare_data_loader)
    _replace(module.Accelerator, "_prepare_cp", lambda original: _prepare_cp)
    _replace(ParallelismConfig, "_validate_accelerator", _validate)


def unpatch_accelerate() -> None:
    """Undo `patch_accelerate`."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)


def _replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    _originals.append((owner, name, original))
    setattr(owner, name, make(original))


def _prepare_data_loader(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_data_loader(dataloader: DataLoader[Any], device: Any = None, *args: Any, **kwargs: Any) -> Any:
        mesh = kwargs.get("torch_device_mesh")
        if mesh is None or "cp" not in mesh.mesh_dim_names:
            return original(dataloader, device, *args, **kwargs)
        if kwargs.get("dispatch_batches"):
            raise ConfigError(
                "dispatch_batches=True gives each rank a part of a batch, but the ranks of a 'cp' group need the same one: "
                "leave it out."
            )
        _share_shuffle(dataloader, device)
        # Left out, accelerate would dispatch the batches of iterable datasets.
        return original(dataloader, device, *args, **(kwargs | {"dispatch_batches": False}))

    return prepare_data_loader


def _share_shuffle(dataloader: DataLoader[Any], device: Any) -> None:
    """Let all ranks shuffle alike: where there is one group, accelerate leaves each to its own random numbers."""
    samplers = (dataloader.sampler, getattr(dataloader.batch_sampler, "sampler", None))
    for sampler in samplers:
        if isinstance(sampler, RandomSampler) and sampler.generator is None:
            world = dist.group.WORLD
            assert world is not None
            seed = shared_seed(torch.device(device or "cpu"), dist.get_world_size(), world.group_name)
            sampler.generator = torch.Generator()
            sampler.generator.manual_seed(int(seed))


def _prepare_cp(self: Any, *args: Any) -> tuple[Any, ...]:
    """Return the objects as they are, in the place of what would attach hooks to models."""
    self._cp_context = lambda **buffers: contextlib.nullcontext()
    return args


def _validate(original: Callable[..., Any]) -> Callable[..., Any]:
    def validate(self: Any, accelerator: Any) -> None:
        if accelerator.distributed_type != "MULTI_CPU":
            return original(self, accelerator)  # type: ignore[no-any-return]
        # Accelerate refuses all meshes of CPUs.
        if self.total_size != accelerator.num_processes:
            raise ConfigError(f"{self} is for {self.total_size} ranks, but there are {accelerator.num_processes}.")
        return None

    return validate
