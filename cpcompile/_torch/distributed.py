"""Distributed: process groups by name and symmetric memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch._dynamo
import torch.fx.traceback

from cpcompile._torch.functorch import TransformError as TransformError
from cpcompile._torch.signals import Signals, can_signal


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """Return the process group with that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return _resolve_process_group(name)  # type: ignore[arg-type]


def group_store(group: torch.distributed.ProcessGroup) -> Any:
    """Return the store by which the ranks of a group have met, with keys of its own."""
    from torch.distributed.distributed_c10d import _world

    return _world.pg_map[group][1]


def group_names() -> set[str]:
    """Return the names of all process groups that this rank is in."""
    from torch.distributed.distributed_c10d import _world

    return {str(name) for name in _world.pg_names.values()}


def twin_group(group: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup | None:
    """Return another group of the same ranks, None where torch cannot make one without the ranks outside. Collective.

    Torch names a group that some ranks make alone by how many groups a rank belongs to: where these numbers differ, it would wait
    for ever.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    numbers: list[int] = [0] * group.size()
    dist.all_gather_object(numbers, len(_world.pg_names), group=group)
    if len(set(numbers)) > 1:
        return None
    twin: dist.ProcessGroup = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    return twin


def all_reduce_together(tensors: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup | None) -> Work:
    """Start the sums of tensors of one dtype over a group, in place, with one launch; return what waits for all of them."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _coalescing_manager

    with _coalescing_manager(group=group, async_ops=True) as manager:
        for each in tensors:
            dist.all_reduce(each, group=group)
    return manager  # type: ignore[no-any-return]


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Make the current stream wait for it."""


def shares_gpus() -> bool:
    """Whether torch lets several ranks have symmetric memory on one GPU, which somebody has to ask for."""
    return os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "").lower() in ("1", "y", "yes", "t", "true")


class SymmetricMemory:
    """Bytes on a GPU that the other ranks of a group can read. All of them make it at once, of one size; their hosts wait for it.

    Multicast is not used. Raises `RuntimeError` where the GPUs cannot read each other's memory.
    """

    def __init__(self, num_bytes: int, device: torch.device, group: str) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory
        from torch._C._distributed_c10d import _SymmetricMemory

        # Not `symmetric_memory.empty`: its pool would keep what is given back.
        self._own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
        self._handle = symmetric_memory.rendezvous(self._own, group)  # type: ignore[arg-type]
        self._of: dict[int, torch.Tensor] = {}
        # Barriers in CUDA graphs use the first words of the pads.
        last = self._handle.signal_pad_size - 4 * self._handle.world_size
        pads = [address + last for address in self._handle.signal_pad_ptrs]
        self._signals = Signals(pads, self._handle.rank, device) if can_signal(device) else None

    def of(self, rank: int) -> torch.Tensor:
        """Return the bytes of a rank, by its number in the group."""
        if rank not in self._of:
            self._of[rank] = self._handle.get_buffer(rank, (self._own.numel(),), torch.uint8)
        return self._of[rank]

    def barrier(self) -> None:
        """Make the current stream wait until those of all ranks are here."""
        if self._signals is None or torch.cuda.is_current_stream_capturing():  # a graph would repeat the numbers
            self._handle.barrier(channel=0)
        else:
            self._signals.meet()
