"""Distributed: process groups by name and symmetric memory."""

from __future__ import annotations

import os

import torch
import torch._dynamo
import torch.fx.traceback

from cpcompile._torch.functorch import TransformError as TransformError


def resolve_group(name: str) -> torch.distributed.ProcessGroup:
    """Return the process group with that name."""
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return _resolve_process_group(name)  # type: ignore[arg-type]


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

    def of(self, rank: int) -> torch.Tensor:
        """Return the bytes of a rank, by its number in the group."""
        if rank not in self._of:
            self._of[rank] = self._handle.get_buffer(rank, (self._own.numel(),), torch.uint8)
        return self._of[rank]

    def barrier(self) -> None:
        """Make the current stream wait until those of all ranks are here."""
        self._handle.barrier(channel=0)
