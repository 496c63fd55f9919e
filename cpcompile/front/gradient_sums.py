"""Gradient sums: what leaves the transformed graph as a gradient is the sum over the axis, in buckets.

Each rank back-propagates its own tokens' part, so the parts add up to the single-device gradient. The sum is
taken where gradients leave the graph, not where they reach `.grad`: what else a parameter is used for (a
penalty, another model, earlier micro-batches) is not the graph's to sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from cpcompile.options.mesh import Axis

BUCKET_BYTES = 64 << 20  # large enough for full bandwidth, small beside the gradients themselves


class GradientSync:
    """Sums the gradients of one model over an axis."""

    def __init__(self, axis: Axis, scale: float = 1.0) -> None:
        self.axis, self.scale = axis, scale
        self.enabled = True
        self._unsummed: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __call__(self, tensors: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return `tensors` such that the gradients that flow back through them are summed over the axis.

        `keys` are the same at each call: gradients that `no_sync` keeps back are kept under them.
        """
        return SumGradients.apply(self, keys, *tensors)  # type: ignore[no-any-return, no-untyped-call]

    def sum(self, tensors: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Return the summed gradients, or None for all inside `no_sync`, which keeps them for the next backward outside."""
        grads = [self._with_unsummed(tensor, grad) for tensor, grad in zip(tensors, grads, strict=True)]
        if not self.enabled:
            for tensor, grad in zip(tensors, grads, strict=True):
                if grad is not None:
                    self._unsummed[tensor] = grad
            return [None] * len(grads)
        flat = [self._all_reduce(bucket) for bucket in buckets(grad for grad in grads if grad is not None)]
        summed = iter([grad for bucket in flat for grad in bucket])
        return [None if grad is None else next(summed) for grad in grads]

    def _with_unsummed(self, tensor: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor | None:
        earlier = self._unsummed.get(tensor)  # type: ignore[no-untyped-call]
        self._unsummed.pop(tensor, None)  # type: ignore[no-untyped-call]
        return grad if earlier is None else earlier if grad is None else earlier + grad

    def _all_reduce(self, bucket: list[torch.Tensor]) -> list[torch.Tensor]:
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=self.axis.process_group)
        if self.scale != 1:
            flat *= self.scale
        parts = torch.split(flat, [grad.numel() for grad in bucket])
        # Each gradient gets memory of its own: one that a user keeps must not keep the bucket.
        return [part.clone().view(grad.shape) for grad, part in zip(bucket, parts, strict=True)]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients back inside this context; the next backward outside sums and delivers them too."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


class SumGradients(torch.autograd.Function):
    """Identity on the inputs of a graph; backward runs once, with the gradients of all of them."""

    @staticmethod
    def forward(
        ctx: Any, sync: GradientSync, keys: Sequence[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sync, ctx.keys = sync, keys
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, None, *ctx.sync.sum(ctx.keys, grads)


def buckets(grads: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group gradients, in order, by dtype and up to `BUCKET_BYTES`."""
    bucket: list[torch.Tensor] = []
    size = 0
    for grad in grads:
        if bucket and (size + grad.nbytes > BUCKET_BYTES or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.nbytes
    if bucket:
        yield bucket
