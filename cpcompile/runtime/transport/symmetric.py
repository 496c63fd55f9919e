"""Symmetric memory: a message lies where the other ranks of the host can read it, and each copies what it needs of it.

Contiguous runs are copied by the copy engines of a GPU, on a side stream, so that attention keeps all SMs:

    message laid in a slot | side: barrier, copies of parts of the others' slots | Transfer.wait: an event

No message is overwritten while it is read. The barriers and copies of a rank are on its side stream, in one order on all ranks;
the barrier of a message goes there with the copies of its first step. Who has passed a barrier knows that every side stream has
reached it, so that all copies started before it are done, on all ranks. `num_starts` tells, on all ranks alike, when the last
copy of a message is started. So a slot may be written once the barrier of a message after that start is passed, and the next
message in it waits for this barrier and the copies behind it. Messages that follow each other alternate between two slots, and
gradients posted while keys are still read take a third: the memory is two or three times the largest message. Slots are taken
and grown by what is the same on every rank: the order of posts, and `largest`.

What is copied into belongs to the current stream: the side stream waits for it before a copy, and it waits for the copy in
`Transfer.wait`, so that the allocator needs to know nothing.

A CUDA graph is replayed between other work that it cannot wait for. So a captured message has a barrier before it is laid and
another after its last copy, and the current stream waits for both. Run the operators before capturing: that makes the slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cpcompile._torch import SymmetricMemory
from cpcompile.runtime.transport.streams import Side
from cpcompile.runtime.transport.transfer import Event, Parts, Ring, Transfer

Tensor = torch.Tensor
GRANULE = 2 << 20  # bytes: the pages that a GPU maps


class Memory(Protocol):
    """As many bytes on each rank of a group, which all of them can read."""

    def of(self, rank: int) -> Tensor:
        """Return the bytes of a rank, by its number in the group."""

    def barrier(self) -> None:
        """Make the current stream wait until those of all ranks are here."""


class Device(Protocol):
    """What a lane needs of the device of a rank."""

    def memory(self, num_bytes: int, group: str) -> Memory:
        """Allocate memory on all ranks of a group at once, as much on each."""

    def aside(self, work: Callable[[], None]) -> Event:
        """Run work on the side stream, after what the current one holds; return when it is done."""

    def is_capturing(self) -> bool:
        """Tell whether the current stream is captured in a graph."""


class CudaDevice:
    """A GPU. The side stream goes first where both want an SM: in CUDA graphs it puts barriers of one warp there."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, Side(device, priority=-1)

    def memory(self, num_bytes: int, group: str) -> Memory:
        """Allocate memory; the hosts of all ranks wait for each other."""
        return SymmetricMemory(num_bytes, self._device, group)

    def aside(self, work: Callable[[], None]) -> Event:
        """Run work on the side stream, after what the current one holds."""
        return self._side.run(work)[1]

    def is_capturing(self) -> bool:
        """Tell whether the current stream is captured in a graph."""
        return torch.cuda.is_current_stream_capturing()


class Slot:
    """Room for one message on each rank."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.memory: Memory | None = None
        self.is_live = False  # a message is laid in it, or may still be fetched from
        self.is_captured = False  # a graph holds its address

    def grow(self, num_bytes: int, device: Device, group: str) -> None:
        """Replace the memory by more."""
        # Longer and longer sequences should not each pay for a new allocation.
        num_bytes = max(num_bytes, self.num_bytes + self.num_bytes // 4)
        self.num_bytes = -(-num_bytes // GRANULE) * GRANULE
        self.memory = None  # returned before the new one is asked for
        self.memory = device.memory(self.num_bytes, group)


class Lane:
    """The messages of one group of ranks on one device."""

    def __init__(self, ring: Ring, device: Device) -> None:
        """Take no memory yet."""
        self.ring, self.device = ring, device
        self._laid: Slot | None = None
        self._read: list[Slot] = []  # all copies are started, none of the barriers is later than them
        self._free: deque[tuple[Slot, Event]] = deque()  # and what a writer waits for; the longest free first
        self._kept: list[Slot] = []  # too small, but graphs have copies from them

    def lay(self, numel: int, largest: int, dtype: torch.dtype) -> Tensor:
        """Return a flat tensor to lay a message in; that of no rank has more than `largest` elements."""
        assert numel <= largest, (numel, largest)
        num_bytes = largest * dtype.itemsize
        slot = self._captured_slot(num_bytes) if self.device.is_capturing() else self._next_slot(num_bytes)
        slot.is_live, self._laid = True, slot
        assert slot.memory is not None
        return slot.memory.of(self.ring.rank)[: numel * dtype.itemsize].view(dtype)

    def _next_slot(self, num_bytes: int) -> Slot:
        slot = Slot()
        if self._free:
            slot, freed = self._free.popleft()
            freed.wait()
        if slot.num_bytes < num_bytes and slot.is_captured:
            self._kept.append(slot)
            slot = Slot()
        if slot.num_bytes < num_bytes:
            slot.grow(num_bytes, self.device, self.ring.group)
        return slot

    def _captured_slot(self, num_bytes: int) -> Slot:
        known = [*(slot for slot, _ in self._free), *self._read]
        slot = next((slot for slot in known if not slot.is_live and slot.num_bytes >= num_bytes), None)
        if slot is None or slot.memory is None:
            raise RuntimeError("run the attention operators once, with these sizes, before capturing them in a graph")
        slot.is_captured = True
        self.device.aside(slot.memory.barrier).wait()
        return slot

    def post(self, message: Tensor, num_starts: int) -> PostedHere:
        """Let the others copy from the message laid last, in `num_starts` steps."""
        slot, self._laid = self._laid, None
        assert slot is not None and slot.memory is not None and num_starts > 0
        return PostedHere(self, slot, slot.memory, message.dtype, num_starts)

    def passed(self, barrier: Event) -> None:
        """Remember what comes after the barrier of a message: what was read before it may be written."""
        if not self.device.is_capturing():
            self._free.extend((read, barrier) for read in self._read)
            self._read.clear()

    def close(self, slot: Slot) -> None:
        """Remember that all copies from a message are started."""
        slot.is_live = False
        if not self.device.is_capturing():  # a captured slot is still where it was
            self._read.append(slot)


@dataclass(slots=True)
class PostedHere:
    """A message in symmetric memory, from which `num_starts` more steps fetch."""

    lane: Lane
    slot: Slot
    memory: Memory
    dtype: torch.dtype
    num_starts: int
    is_met: bool = False  # the barrier is on the side stream

    def start(self, steps: Sequence[int], into: Sequence[Sequence[Tensor]], parts: Parts) -> Transfer:
        """Start copying from each rank - step into contiguous tensors, one for each part."""
        self.num_starts -= len(steps)
        assert self.num_starts >= 0, "more steps than were told when the message was posted"
        ring, device, is_first, is_last = self.lane.ring, self.lane.device, not self.is_met, self.num_starts == 0
        ends_capture = is_last and device.is_capturing()
        pairs = []
        for source, tensors in zip(map(ring.before, steps), into, strict=True):
            runs = parts(ring.rank, source)
            message = self.memory.of(source).view(self.dtype) if runs else None
            for to, run in zip(tensors, runs, strict=True):
                assert message is not None
                pairs.append((to if to.dim() == 1 else to.view(-1), message[run]))

        def copy() -> None:
            if is_first:
                self.memory.barrier()
            for to, run in pairs:
                to.copy_(run)
            if ends_capture:
                self.memory.barrier()

        # Streams meet at a price, which steps without a byte do not pay; the first has the barrier with it.
        done = device.aside(copy) if pairs or is_first or ends_capture else None
        if is_first and done is not None:
            self.is_met = True
            self.lane.passed(done)
        if is_last:
            self.lane.close(self.slot)
        return Transfer((done,) if done is not None else (), tuple(to for to, _ in pairs))
