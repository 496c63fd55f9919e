"""Mesh: the context-parallel axis of a `DeviceMesh`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a mesh, as this rank sees it."""

    world_size: int
    rank: int
    group: str
    device_type: str

    @property
    def process_group(self) -> torch.distributed.ProcessGroup:
        """The ranks of the axis."""
        from cpcompile import _torch

        return _torch.resolve_group(self.group)


def axis_of(mesh: DeviceMesh, axis: str | None) -> Axis:
    """Return the context-parallel axis of `mesh`: its only one, or the one called `axis`.

    Raises:
        ConfigError: `mesh` is no mesh, has several axes and none is named, has no axis of that name, or
            leaves this rank out.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(f"mesh must be a DeviceMesh (torch.distributed.init_device_mesh), not {type(mesh).__name__}.")
    names = mesh.mesh_dim_names or ()
    listed = ", ".join(repr(name) for name in names) or "none has a name"
    if axis is not None and axis not in names:
        raise ConfigError(f"the mesh has no axis {axis!r} (its axes: {listed}; shape {tuple(mesh.shape)}).")
    if axis is None and mesh.ndim != 1:
        raise ConfigError(
            f"the mesh has {mesh.ndim} axes ({listed}; shape {tuple(mesh.shape)}): say which one shards the sequence, axis='...'."
        )
    chosen = mesh if axis is None or mesh.ndim == 1 else mesh[axis]
    if chosen.get_coordinate() is None:
        rank = torch.distributed.get_rank()
        raise ConfigError(
            f"rank {rank} is not in the mesh {mesh.mesh.tolist()}: every rank that runs the model must be."
        )
    return Axis(chosen.size(), chosen.get_local_rank(), chosen.get_group().group_name, chosen.device_type)
