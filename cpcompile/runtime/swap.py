"""Swap: every rank sends tensors to every other, an all-to-all, while something else is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch

from cpcompile.runtime.post import Ring, Transfer, new_message, post

Tensor = torch.Tensor
Sizes = Callable[[int, int], Sequence[int]]  # the elements of each tensor that a source sends to a receiver


class Swap:
    """Tensors on their way between the ranks of a ring, each rank's in one message."""

    def __init__(
        self,
        sent: Sequence[Sequence[Tensor]],
        received: Sequence[Sequence[Tensor]],
        sizes: Sizes,
        like: Tensor,
        ring: Ring,
    ) -> None:
        """Start.

        Args:
            sent: for each rank, what it gets from this one.
            received: for each rank, tensors that `finish` has filled with what it sends, of the same shapes.
            sizes: the elements of each tensor that a source sends to a receiver.
            like: a tensor of the same dtype and device.
            ring: the ranks.
        """
        self._under_way: list[tuple[Transfer, list[tuple[Tensor, Tensor]]]] = []
        others = [rank for rank in range(ring.size) if rank != ring.rank]
        if others:
            ranks = range(ring.size)
            totals = [[sum(sizes(source, to)) if to != source else 0 for to in ranks] for source in ranks]
            message = new_message(sum(totals[ring.rank]), like, ring, max(map(sum, totals)))
            start = 0
            for x in (x for rank in others for x in sent[rank]):
                message[start : start + x.numel()].view(x.shape).copy_(x)
                start += x.numel()

            def parts(receiver: int, source: int) -> list[slice]:
                ends = accumulate(sizes(source, receiver), initial=sum(totals[source][:receiver]))
                return [slice(a, b) for a, b in pairwise(ends) if a < b]

            posted = post(message, ring, num_starts=len(others))
            for step in range(1, ring.size):
                targets = [x for x in received[ring.before(step)] if x.numel()]
                into = [_contiguous(x) for x in targets]
                self._under_way.append((posted.start(step, into, parts), list(zip(targets, into, strict=True))))
        for to, x in zip(received[ring.rank], sent[ring.rank], strict=True):
            to.copy_(x)

    def finish(self) -> None:
        """Wait, on the stream, for all that is received."""
        for transfer, pairs in self._under_way:
            transfer.wait()
            for to, x in pairs:
                if x is not to:
                    to.copy_(x)


def _contiguous(x: Tensor) -> Tensor:
    """Return `x` or, if it is not one run of memory, a tensor to receive it in."""
    return x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
