"""Data: which part of a data set a rank reads, where the ranks of a group pass the same batch to the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.errors import ConfigError
from cpcompile.options.mesh import axis_of


def rank_and_replicas(mesh: DeviceMesh, axis: str | Sequence[str] | None = None) -> tuple[int, int]:
    """Return (rank, number of replicas) for what deals data to ranks, so that the ranks of a group read the same.

    The ranks of the context-parallel axis share each sequence and pass the same whole batch; groups read different ones:

        rank, num_replicas = cpcompile.rank_and_replicas(mesh, "cp")
        DistributedSampler(dataset, num_replicas=num_replicas, rank=rank)  # also for torchdata's StatefulDataLoader
        datasets.distributed.split_dataset_by_node(dataset, rank=rank, world_size=num_replicas)

    Args:
        mesh: of all ranks that train, so that every group is known; one axis of it does not tell.
        axis: the axes along which ranks read the same: the one that shards sequences or the pair, and others that need equal
            batches too (tensor parallelism). It may be left out for a mesh of one axis.

    Raises:
        ConfigError: the mesh has no such axis, or not all ranks.
    """
    axis_of(
        mesh, axis if axis is None or isinstance(axis, str) else next(iter(axis))
    )  # refuses what is no axis of the mesh
    if mesh.size() != dist.get_world_size():
        raise ConfigError(
            f"the mesh has {mesh.size()} of {dist.get_world_size()} ranks, so that the number of groups is not known: pass the "
            "mesh of all ranks, and the name of the context-parallel axis."
        )
    names = mesh.mesh_dim_names or ("",)
    alike = {names[0]} if axis is None else {axis} if isinstance(axis, str) else set(axis)
    if missing := sorted(alike - set(names)):
        raise ConfigError(
            f"the mesh has no axis {', '.join(map(repr, missing))} (its axes: {', '.join(map(repr, names))})."
        )
    rank, replicas = 0, 1
    for name, size, coordinate in zip(names, mesh.shape, mesh.get_coordinate() or (), strict=True):
        if name not in alike:
            rank, replicas = rank * size + coordinate, replicas * size
    return rank, replicas
