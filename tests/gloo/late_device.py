"""A device for lanes in which everything is late: processes that share memory, and a thread as the side stream.

The current stream is the thread that calls. It and the side stream wait for a random time before each piece of work, so that a
message that is overwritten too early, or read before it is there, shows in the results.
"""

from __future__ import annotations

import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group

PATIENCE = 30.0  # seconds until a barrier gives up


class SharedMemory:
    """Bytes of each rank in files that all ranks map, and flags for a barrier."""

    def __init__(self, num_bytes: int, group: str, has_barriers: bool) -> None:
        ranks = resolve_group(group)
        self._rank, self._size, self._has_barriers = dist.get_rank(ranks), dist.get_world_size(ranks), has_barriers
        folder = [tempfile.mkdtemp(prefix="cpcompile_slots_")]
        dist.broadcast_object_list(folder, group=ranks, group_src=0)

        def mapped(name: str, size: int) -> torch.Tensor:
            return torch.from_file(os.path.join(folder[0], name), shared=True, size=size, dtype=torch.uint8)

        own = mapped(str(self._rank), num_bytes)
        own.fill_(0xFF)  # NaN in every dtype
        if self._rank == 0:
            mapped("flags", self._size**2).zero_()
        dist.barrier(ranks)
        self._bytes = [mapped(str(rank), num_bytes) for rank in range(self._size)]
        self._flags = mapped("flags", self._size**2).view(self._size, self._size).numpy()
        dist.barrier(ranks)
        if self._rank == 0:
            for name in os.listdir(folder[0]):
                os.remove(os.path.join(folder[0], name))
            os.rmdir(folder[0])

    def of(self, rank: int) -> torch.Tensor:
        """Return the bytes of a rank."""
        return self._bytes[rank]

    def barrier(self) -> None:
        """Wait for all ranks, by flags that who sets them waits to be cleared, as on GPUs."""
        if not self._has_barriers:
            return
        for other in range(self._size):
            if other != self._rank:
                self._set(other, self._rank, 1)
        for other in range(self._size):
            if other != self._rank:
                self._set(self._rank, other, 0)

    def _set(self, to: int, by: int, value: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while self._flags[to, by] == value:
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {self._rank} waits in a barrier")
            time.sleep(1e-5)
        self._flags[to, by] = value


class Done:
    """The end of some work on the side stream."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._error: Exception | None = None

    def set(self, error: Exception | None) -> None:
        """Let those who wait go on."""
        self._error = error
        self._event.set()

    def wait(self) -> None:
        """Wait, and raise what the work raised."""
        assert self._event.wait(2 * PATIENCE)
        if self._error is not None:
            raise self._error


class LateDevice:
    """Each piece of work on the side stream starts up to `delay` seconds late, and the current stream is half as late."""

    def __init__(self, delay: float, seed: int, has_barriers: bool = True) -> None:
        self._delay, self._random, self._has_barriers = delay, random.Random(seed), has_barriers
        self.num_memories, self.captures = 0, False
        self._work: queue.Queue[tuple[Callable[[], None], Done]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            time.sleep(self._delay * self._random.random())
            try:
                work()
                done.set(None)
            except Exception as error:
                done.set(error)

    def memory(self, num_bytes: int, group: str) -> SharedMemory:
        """Map memory of all ranks."""
        self.num_memories += 1
        return SharedMemory(num_bytes, group, self._has_barriers)

    def aside(self, work: Callable[[], None]) -> Done:
        """Put work into the side stream."""
        done = Done()
        time.sleep(self._delay / 2 * self._random.random())
        self._work.put((work, done))
        return done

    def is_capturing(self) -> bool:
        """Tell whether messages should be laid as in a graph; they are exchanged at once all the same."""
        return self.captures
