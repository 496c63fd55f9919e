"""Mesh: the context-parallel axis of a `DeviceMesh`, or the pair of axes that together are one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.errors import ConfigError
from cpcompile.options.checking import an, did_you_mean, fits

MOST_IN_PROCESS = 4096  # planning takes time and memory with the square of the ranks: a minute at this number


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks that share each sequence, as this rank sees them.

    Attributes:
        world_size, rank, group: of all of them; `group` is the name of their process group, '' for ranks that exist in this
            process only.
        device_type: of the mesh.
        inner_size: ranks that exchange heads in `usp`, 0 where the ranks are no grid. Rank r is at (outer r // inner_size,
            inner r % inner_size).
        inner_group, outer_group: the process groups of this rank along both axes of the grid.
    """

    world_size: int
    rank: int
    group: str
    device_type: str
    inner_size: int = 0
    inner_group: str = ""
    outer_group: str = ""

    @classmethod
    def in_process(cls, world_size: int, inner_size: int = 0) -> Axis:
        """Return an axis of ranks that exist in this process only.

        Raises:
            ConfigError: there is no rank, or `inner_size` does not divide their number.
        """
        if world_size < 1:
            raise ConfigError(f"world_size={world_size}: there is at least one rank.")
        if world_size > MOST_IN_PROCESS:
            raise ConfigError(
                f"world_size={world_size}: a plan without processes compares each rank with each, and is made for at most "
                f"{MOST_IN_PROCESS} ranks."
            )
        if inner_size < 0 or (inner_size and world_size % inner_size):
            raise ConfigError(f"inner_size={inner_size} does not divide world_size={world_size}.")
        return cls(world_size, 0, "", "", inner_size)

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of all process groups."""
        return tuple(group for group in (self.group, self.inner_group, self.outer_group) if group)

    @property
    def process_group(self) -> torch.distributed.ProcessGroup:
        """The ranks of the axis."""
        from cpcompile import _torch

        return _torch.resolve_group(self.group)

    @property
    def ranks(self) -> list[int]:
        """The global ranks of the axis; those of this process only have none but its own."""
        if self.group:
            return torch.distributed.get_process_group_ranks(self.process_group)
        return [torch.distributed.get_rank()] if torch.distributed.is_initialized() else []


def axis_of(mesh: DeviceMesh, axis: str | Sequence[str] | None) -> Axis:
    """Return the context-parallel axis of `mesh`: its only one, the one called `axis`, or the pair (ring, Ulysses) flattened.

    Raises:
        ConfigError: `mesh` is no mesh, has several axes and none is named, has no axis of that name, or
            leaves this rank out; a pair is no pair, or not in the order of the mesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ConfigError(f"mesh must be a DeviceMesh (torch.distributed.init_device_mesh), not {type(mesh).__name__}.")
    names = mesh.mesh_dim_names or ()
    listed = ", ".join(repr(name) for name in names) or "none has a name"
    if not fits(axis, str | Sequence[str] | None):
        raise ConfigError(
            f"axis={axis!r} is {an(type(axis).__name__)}: name an axis of the mesh ({listed}), or two, "
            "axis=('ring axis', 'ulysses axis')."
        )
    wanted = () if axis is None else (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ConfigError(
            f"the mesh has no axis {', '.join(map(repr, missing))} (its axes: {listed}; shape {tuple(mesh.shape)})."
            + did_you_mean(missing[0], names)
        )
    if not wanted and mesh.ndim != 1:
        raise ConfigError(
            f"the mesh has {mesh.ndim} axes ({listed}; shape {tuple(mesh.shape)}): say which one shards the sequence, "
            "axis='...', or which two, axis=('ring axis', 'ulysses axis')."
        )
    if mesh.get_coordinate() is None:
        rank = torch.distributed.get_rank()
        raise ConfigError(
            f"rank {rank} is not in the mesh {mesh.mesh.tolist()}: every rank that runs the model must be."
        )
    if len(wanted) > 1 or (axis is not None and not isinstance(axis, str)):
        return grid_of(mesh, wanted)
    chosen = mesh if mesh.ndim == 1 else mesh[wanted[0]]
    return Axis(chosen.size(), chosen.get_local_rank(), chosen.get_group().group_name, chosen.device_type)


def grid_of(mesh: DeviceMesh, pair: tuple[str, ...]) -> Axis:
    """Return the axis of all ranks of a pair of axes (outer, inner). Collective: the group of all is made at the first call.

    Raises:
        ConfigError: these are not two axes, or not outer before inner, or their ranks are out of order.
    """
    if len(set(pair)) != 2 or len(pair) != 2:
        raise ConfigError(f"axis={pair!r} is no pair: name the ring's axis and another one for Ulysses.")
    outer, inner = pair
    names = mesh.mesh_dim_names or ()
    if names.index(outer) > names.index(inner):
        raise ConfigError(
            f"axis={pair!r} is not in the order of the mesh {names!r}: the ranks that exchange heads (the second axis) are to be "
            f"neighbours. Name {(inner, outer)!r}, or make the mesh with {outer!r} before {inner!r}."
        )
    grid = mesh[outer, inner]
    ranks = grid.mesh.flatten().tolist()
    if ranks != sorted(ranks):
        raise ConfigError(f"the ranks of the axes {pair!r} are {grid.mesh.tolist()}: they must be in ascending order.")
    flat = grid._flatten(f"cpcompile_{outer}_{inner}")
    return Axis(
        world_size=flat.size(),
        rank=flat.get_local_rank(),
        group=flat.get_group().group_name,
        device_type=mesh.device_type,
        inner_size=grid.size(1),
        inner_group=grid.get_group(inner).group_name,
        outer_group=grid.get_group(outer).group_name,
    )
