"""Lightning: DDP in which the ranks of a group share each sequence.

trainer = Trainer(strategy=ContextParallelStrategy(), ...)                    # the changed argument
trainer.fit(module, loader)                                                   # module.model is context parallel
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from cpcompile.errors import ConfigError
from cpcompile.front.apply import parallel_parts
from cpcompile.front.data import rank_and_replicas

try:
    from lightning.pytorch.strategies import DDPStrategy
except ImportError as error:
    raise ImportError(
        f"cpcompile.integrations.lightning needs lightning ({error}): pip install 'cpcompile[integrations]'."
    ) from error


class ContextParallelStrategy(DDPStrategy):  # type: ignore[misc]
    """DDP over all ranks, in which groups of `size` neighbouring ranks share each sequence.

    The sampler that Lightning puts in deals the same batches to the ranks of a group, and different ones to groups; with
    `use_distributed_sampler=False` and for iterable data sets that is up to you, by `cpcompile.rank_and_replicas(strategy.mesh,
    "cp")`. Logged losses, accumulation and clipping are as on one device that gets the batches of all groups.

    Args:
        module: the attribute of the LightningModule that holds the model.
        size: ranks that share a sequence; 0: all.
        options: as for `cpcompile.apply`, e.g. `{"strategy": "ring"}`; `grad_sync` is DDP's.
        ddp: arguments of `DDPStrategy`.
    """

    def __init__(
        self, module: str = "model", size: int = 0, options: Mapping[str, Any] | None = None, **ddp: Any
    ) -> None:
        super().__init__(**ddp)
        self.mesh: DeviceMesh | None = None
        self._module, self._size, self._options = module, size, dict(options or {})
        if "grad_sync" in self._options:
            raise ConfigError("DDP averages the gradients, so grad_sync is known: leave it out.")

    def setup_environment(self) -> None:
        """Make the mesh, once there are process groups: axes `dp` and `cp`."""
        super().setup_environment()
        world, size = self.world_size, self._size or self.world_size
        if world % size:
            raise ConfigError(f"{world} ranks do not form groups of {size}: choose a size that divides their number.")
        self.mesh = init_device_mesh(self.root_device.type, (world // size, size), mesh_dim_names=("dp", "cp"))

    def setup(self, trainer: Any) -> None:
        """Make the model context parallel, before DDP wraps the LightningModule."""
        holder = self.lightning_module
        model = getattr(holder, self._module, None)
        if not isinstance(model, torch.nn.Module):
            children = ", ".join(name for name, _ in holder.named_children()) or "none"
            raise ConfigError(
                f"{type(holder).__name__} has no model {self._module!r} (its modules: {children}): say which attribute holds it, "
                "ContextParallelStrategy(module='...'), and make it in __init__ or configure_model."
            )
        if not parallel_parts(model):
            cpcompile.apply(model, self.mesh_of_ranks(), axis="cp", grad_sync="mean", **self._options)
        super().setup(trainer)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """What Lightning's sampler deals by."""
        rank, replicas = rank_and_replicas(self.mesh_of_ranks(), "cp")
        return {"num_replicas": replicas, "rank": rank}

    def mesh_of_ranks(self) -> DeviceMesh:
        """Return the mesh, which there is once the processes have met."""
        assert self.mesh is not None
        return self.mesh
