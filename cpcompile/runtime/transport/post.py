"""Post: each rank lays out a message, and the others fetch the parts of it that they need, directly and in the order of a ring.

    message = new_message(numel, like, ring)
    posted = post(message, ring, num_starts=2)
    transfer = posted.start([1], [into], parts)     # from the rank 1 before this one; that 1 behind is served in the same beat
    ...                                         # compute
    transfer.wait()

Nothing is relayed: what rank r fetches at step t comes from rank r - t, so that only needed bytes travel, each once. They are
copied from symmetric memory or sent and received, see `transport`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group
from cpcompile.runtime.transport.choice import lane_of
from cpcompile.runtime.transport.choice import set_transport as set_transport
from cpcompile.runtime.transport.choice import transport_of as transport_of
from cpcompile.runtime.transport.transfer import Parts as Parts
from cpcompile.runtime.transport.transfer import Posted as Posted
from cpcompile.runtime.transport.transfer import Ring as Ring
from cpcompile.runtime.transport.transfer import Transfer as Transfer

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message of which each rank sends the others their parts. On GPUs that is done on a stream of its own."""

    message: Tensor
    ring: Ring

    def start(self, steps: Sequence[int], into: Sequence[Sequence[Tensor]], parts: Parts) -> Transfer:
        """Start receiving from each rank - step into contiguous tensors, one for each part, and sending to rank + step."""
        group, ring, exchange = resolve_group(self.ring.group), self.ring, []
        for step, tensors in zip(steps, into, strict=True):
            source, receiver = ring.before(step), ring.after(step)
            sent = [self.message[part] for part in parts(receiver, ring.rank)]
            exchange += [dist.P2POp(dist.isend, x, group=group, group_peer=receiver) for x in sent]
            exchange += [dist.P2POp(dist.irecv, x.view(-1), group=group, group_peer=source) for x in tensors]
        events = tuple(dist.batch_isend_irecv(exchange)) if exchange else ()
        return Transfer(events, (self.message, *(x for tensors in into for x in tensors)))


def new_message(numel: int, like: Tensor, ring: Ring, largest: int | None = None) -> Tensor:
    """Return a flat tensor to lay a message in; it is posted before the next one is asked for.

    Args:
        numel: elements of the message.
        like: a tensor of the same dtype and device.
        ring: the ranks.
        largest: at least the elements of each rank's message, one number on all ranks; None: their messages are of one size.
    """
    lane = lane_of(ring, like.device)
    return like.new_empty(numel) if lane is None else lane.lay(numel, numel if largest is None else largest, like.dtype)


def post(message: Tensor, ring: Ring, num_starts: int) -> Posted:
    """Let the others fetch from a message that `new_message` returned, in `num_starts` steps. Every rank of the ring posts."""
    lane = lane_of(ring, message.device)
    return _Sent(message, ring) if lane is None else lane.post(message, num_starts)
