"""One rank compiles: the first of the ranks that share a cache on disk does, and the others find there what it compiled."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import torch.distributed as dist

from cpcompile import _torch
from cpcompile.options.mesh import Axis


@contextlib.contextmanager
def one_rank_first(axis: Axis, least: Callable[[int], int]) -> Iterator[None]:
    """Surround the compilation of a program that all ranks of the axis have alike. Collective.

    Where the first rank cannot compile it, the others go on by themselves, and fail as it did or say at the next comparison
    that they did not.

    Args:
        axis: the ranks.
        least: of a number over the ranks of the axis, which raises where one has ended the call with an error.
    """
    is_first = axis.rank == first_beside(axis)
    if not is_first:
        least(0)
    try:
        yield
    finally:
        if is_first:
            least(0)


def first_beside(axis: Axis) -> int:
    """Return the first rank of the axis that reads and writes the same cache as this one. Collective."""
    caches: list[tuple[str, str] | None] = [None] * axis.world_size
    own = (socket.gethostname(), _torch.cache_folder())
    dist.all_gather_object(caches, own, group=axis.process_group)
    return caches.index(own)
