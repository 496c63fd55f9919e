"""Transfer: the ranks of a ring, and what one of them has fetched or is about to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group

Tensor = torch.Tensor
# What `receiver` reads of the message of `source`, as runs of elements. Every rank can tell it for every pair.
Parts = Callable[[int, int], Sequence[slice]]


@dataclass(frozen=True, slots=True)
class Ring:
    """The ranks of a process group, as this rank sees them; `group` is the name of the group."""

    group: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: str, size: int) -> Ring:
        """Return the ring of a group. The rank is read when an operator runs, so that all ranks share one graph."""
        return cls(group, size, 0 if size == 1 else dist.get_rank(resolve_group(group)))

    def before(self, step: int) -> int:
        """Return the rank that is `step` before this one."""
        return (self.rank - step) % self.size

    def after(self, step: int) -> int:
        """Return the rank that is `step` after this one."""
        return (self.rank + step) % self.size


class Event(Protocol):
    """Something that work put into streams later can wait for."""

    def wait(self) -> Any:
        """Make the current stream wait."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """Parts of a message on their way. It owns what is read and written until it has been waited for."""

    events: tuple[Event, ...]
    tensors: tuple[Tensor, ...]

    def wait(self) -> None:
        """Make the current stream wait until what is fetched has arrived."""
        for event in self.events:
            event.wait()


class Posted(Protocol):
    """A message that the ranks of a ring fetch from each other."""

    def start(self, steps: Sequence[int], into: Sequence[Sequence[Tensor]], parts: Parts) -> Transfer:
        """Start fetching, at each step, from rank - step into contiguous tensors, one for each part, and serve rank + step.

        All ranks start the same steps in the same order, though some may have nothing to fetch. Every transfer is waited for.
        """
