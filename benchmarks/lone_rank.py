"""Be one rank of a job whose other ranks do not exist: a process group of fakes, and memory of this process for that of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.runtime.transport import choice as transport
from cpcompile.runtime.transport.symmetric import CudaDevice, Device, Lane

Tensor = torch.Tensor


class Memory:
    """Bytes of this device that stand for those of each rank: what a rank lays, it fetches from all others."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Fill them with random numbers, as GPUs are faster at zeros; two bfloat16 are a finite float32 as well."""
        self._bytes = torch.randn(-(-num_bytes // 2), dtype=torch.bfloat16, device=device).view(torch.uint8)

    def of(self, rank: int) -> Tensor:
        """Return the bytes, whoever is asked for."""
        return self._bytes

    def barrier(self) -> None:
        """Wait for nobody."""


class OnCpu:
    """A rank without streams: all is done at once."""

    def __init__(self, device: torch.device) -> None:
        """Remember the device."""
        self._device = device

    def memory(self, num_bytes: int, group: str) -> Memory:
        """Take memory."""
        return Memory(num_bytes, self._device)

    def aside(self, work: Callable[[], None]) -> OnCpu:
        """Work at once."""
        work()
        return self

    def wait(self) -> None:
        """Be done."""

    def is_capturing(self) -> bool:
        """No graph is captured."""
        return False


class OnCuda(CudaDevice):
    """A GPU with the streams and events that every rank has; what is fetched comes from its own memory."""

    def memory(self, num_bytes: int, group: str) -> Memory:
        """Take memory."""
        return Memory(num_bytes, self._device)


def alone_on(device: torch.device) -> Device:
    """Return what a rank needs of its device."""
    return OnCuda(device) if device.type == "cuda" else OnCpu(device)


@contextmanager
def as_rank(rank: int, world_size: int, here: Callable[[torch.device], Device] = alone_on) -> Iterator[None]:
    """Be a rank of a job whose other ranks do not exist; every group that is made meanwhile copies from memory of `here`."""
    choose = transport._choose
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    transport._choose = lambda ring, device: Lane(ring, here(device))
    try:
        yield
    finally:
        transport._choose = choose
        transport._chosen.clear()
        dist.destroy_process_group()
