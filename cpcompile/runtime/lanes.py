"""Lanes: kernels that do not depend on each other run side by side, so that small ones fill a GPU.

The documents of a packed batch are such kernels: each alone leaves many multiprocessors idle at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
NUM_LANES = 3


@lru_cache(maxsize=32)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(NUM_LANES))  # type: ignore[no-untyped-call]


def side_by_side(
    items: Sequence[Item], compute: Callable[[Item], tuple[torch.Tensor, ...]], device: torch.device
) -> Iterator[tuple[Item, tuple[torch.Tensor, ...]]]:
    """Yield each item with what `compute` returns for it, in order; on a GPU the items are computed side by side.

    What is yielded is ready on the current stream.
    """
    if device.type != "cuda" or len(items) < NUM_LANES:
        for item in items:
            yield item, compute(item)
        return
    current, streams = torch.cuda.current_stream(device), _streams(device)
    for stream in streams:
        stream.wait_stream(current)
    started = []
    for index, item in enumerate(items):
        stream = streams[index % NUM_LANES]
        with torch.cuda.stream(stream):
            started.append((item, compute(item), stream.record_event()))
        # A lane is one item ahead of what is merged, so that few results exist at once.
        if len(started) > NUM_LANES:
            yield _ready(*started.pop(0), current)
    for parts in started:
        yield _ready(*parts, current)


def _ready(
    item: Item, results: tuple[torch.Tensor, ...], event: torch.cuda.Event, current: torch.cuda.Stream
) -> tuple[Item, tuple[torch.Tensor, ...]]:
    """Make the current stream wait for the results, which were allocated on another."""
    current.wait_event(event)
    for x in results:
        x.record_stream(current)
    return item, results
