"""Lanes: kernels that do not depend on each other run side by side, so that one fills what the end of another leaves idle.

The documents of a packed batch are such kernels, and the rectangles of a ring: each alone leaves many multiprocessors idle at its
end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache

import torch

from cpcompile.runtime.transport.streams import Side

Tensors = tuple[torch.Tensor, ...]
NUM_LANES = 3


@lru_cache(maxsize=32)
def _sides(device: torch.device) -> tuple[Side, ...]:
    return tuple(Side(device) for _ in range(NUM_LANES))


class Lanes:
    """Work that is computed beside the current stream, and whose results are taken on it, in order."""

    def __init__(self, device: torch.device, num_items: int) -> None:
        """Expect `num_items` pieces of work; a single one, or work on a CPU, runs where it is submitted."""
        self._device, self._index = device, device.index  # torch takes long to look up the index of a device
        self._is_direct = device.type != "cuda" or num_items < 2
        # What a lane computes from must live until the current stream has waited for it: `compute` holds it.
        self._started: deque[tuple[Callable[[], Tensors], Tensors, torch.cuda.Event, Callable[[Tensors], None]]] = (
            deque()
        )
        self._num_submitted = self._num_taken = 0

    def submit(self, compute: Callable[[], Tensors], take: Callable[[Tensors], None]) -> int:
        """Start `compute` after what the current stream holds; `take` gets its results later. Return its number, from 1.

        Results are allocated for the lane and read on the current stream. They need not be recorded there, which would keep their
        memory until the GPU has caught up with its host: a lane waits for all that the current stream holds before it allocates
        again, and what is dropped by then has been read before that.
        """
        self._num_submitted += 1
        if self._is_direct:
            take(compute())
            self._num_taken += 1
            return self._num_submitted
        side = _sides(self._device)[self._num_submitted % NUM_LANES]
        results, done = side.run(compute)
        self._started.append((compute, results, done, take))
        if len(self._started) > NUM_LANES:  # few results exist at once
            self.wait(self._num_taken + 1)
        return self._num_submitted

    def wait(self, number: int) -> None:
        """Take the results of all work up to that number; the current stream waits for them."""
        current = torch.cuda.current_stream(self._index) if self._started else None
        while self._started and self._num_taken < number:
            assert current is not None
            _, results, done, take = self._started.popleft()
            current.wait_event(done)
            take(results)
            self._num_taken += 1

    def flush(self) -> None:
        """Take all results."""
        self.wait(self._num_submitted)
