"""Streams: work beside the current stream of a GPU, started for as little time of the host as torch allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


class Side:
    """A stream beside the current one."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        """Make the stream; a negative priority goes first where both want a multiprocessor."""
        self._index = device.index  # torch takes long to look up the index of a device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device, priority=priority)  # type: ignore[no-untyped-call]

    def run(self, work: Callable[[], T]) -> tuple[T, torch.cuda.Event]:
        """Run work after what the current stream holds; return its result and when it is done."""
        current = torch.cuda.current_stream(self._index)
        self._stream.wait_stream(current)
        # The context manager `torch.cuda.stream` takes the host 11 us.
        with torch.cuda.device(self._index):
            torch.cuda.set_stream(self._stream)
            try:
                result = work()
            finally:
                torch.cuda.set_stream(current)
        return result, self._stream.record_event()
