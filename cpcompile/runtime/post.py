"""Post: each rank lays out a message, and the others fetch the parts of it that they need, directly and in the order of a ring.

    posted = post(message, ring)
    transfer = posted.start(1, into, parts)     # from the rank 1 before this one; that 1 behind is served in the same beat
    ...                                         # compute
    transfer.wait()

Nothing is relayed: what rank r fetches at step t comes from rank r - t, so that only needed bytes travel, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group

Tensor = torch.Tensor
# What `receiver` reads of the message of `source`, as runs of elements. Every rank can tell it for every pair.
Parts = Callable[[int, int], Sequence[slice]]
Sizes = Callable[[int, int], Sequence[int]]  # of source and receiver


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


@dataclass(frozen=True, slots=True)
class Transfer:
    """Parts of a message on their way. It owns what is sent until it has been waited for."""

    works: tuple[dist.Work, ...]
    sent: Tensor

    def wait(self) -> None:
        """Make the stream wait until what is fetched has arrived."""
        for work in self.works:
            work.wait()


@dataclass(frozen=True, slots=True)
class Posted:
    """A message that the ranks of a ring fetch from each other by sending and receiving."""

    message: Tensor
    ring: Ring

    def start(self, step: int, into: Sequence[Tensor], parts: Parts) -> Transfer:
        """Start fetching from rank - step into contiguous tensors, one for each part, and serve rank + step.

        All ranks start the same steps in the same order, though some may have nothing to fetch.
        """
        group, source, receiver = resolve_group(self.ring.group), self.ring.before(step), self.ring.after(step)
        sent = [self.message[part] for part in parts(receiver, self.ring.rank)]
        exchange = [dist.P2POp(dist.isend, x, group=group, group_peer=receiver) for x in sent]
        exchange += [dist.P2POp(dist.irecv, x.view(-1), group=group, group_peer=source) for x in into]
        return Transfer(tuple(dist.batch_isend_irecv(exchange)) if exchange else (), self.message)


def new_message(numel: int, like: Tensor, ring: Ring) -> Tensor:
    """Return a flat tensor to lay a message in."""
    return like.new_empty(numel)


def post(message: Tensor, ring: Ring) -> Posted:
    """Let the others fetch from a message that `new_message` returned. Every rank of the ring posts."""
    return Posted(message, ring)


def swap(
    sent: Sequence[Sequence[Tensor]], received: Sequence[Sequence[Tensor]], sizes: Sizes, like: Tensor, ring: Ring
) -> None:
    """Send tensors to each rank and receive others, each rank's in one message.

    Args:
        sent: for each rank, what it gets from this one.
        received: for each rank, tensors to fill with what it sends, of the same shapes.
        sizes: the elements of each tensor that `source` sends to `receiver`.
        like: a tensor of the same dtype and device.
        ring: the ranks.
    """
    for to, x in zip(received[ring.rank], sent[ring.rank], strict=True):
        to.copy_(x)
    others = [rank for rank in range(ring.size) if rank != ring.rank]
    if not others:
        return
    message = new_message(sum(sum(sizes(ring.rank, rank)) for rank in others), like, ring)
    start = 0
    for x in (x for rank in others for x in sent[rank]):
        message[start : start + x.numel()].view(x.shape).copy_(x)
        start += x.numel()

    def parts(receiver: int, source: int) -> list[slice]:
        before = sum(sum(sizes(source, rank)) for rank in range(receiver) if rank != source)
        ends = list(accumulate(sizes(source, receiver), initial=before))
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if a < b]

    posted = post(message, ring)
    under_way: list[tuple[Transfer, list[tuple[Tensor, Tensor]]]] = []
    for step in range(1, ring.size):
        targets = [x for x in received[ring.before(step)] if x.numel()]
        into = [x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format) for x in targets]
        under_way.append((posted.start(step, into, parts), list(zip(targets, into, strict=True))))
    for transfer, pairs in under_way:
        transfer.wait()
        for to, x in pairs:
            if x is not to:
                to.copy_(x)
