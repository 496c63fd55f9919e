"""Gradient sums: after a backward, the gradients that it added are summed over the axis, in buckets.

Each rank back-propagates its own tokens' part, so the parts add up. Only what this backward added may be summed: what earlier ones summed
(gradient accumulation) is set aside while it runs.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakIdKeyDictionary

from cpcompile import _torch
from cpcompile.errors import CPError
from cpcompile.mesh import Axis

BUCKET_BYTES = 64 << 20  # large enough for full bandwidth, small beside the gradients themselves


@dataclass(slots=True)
class Watched:
    """A parameter whose gradients are summed: its place in the order that all ranks share, and whether its gradient is still local."""

    order: int
    handle: Any
    is_local: bool = False


class GradientSync:
    """Sums the gradients of watched parameters over an axis at the end of each backward."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.enabled = True
        self._watched: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._backward = -1  # the backward under way
        self._earlier: dict[torch.nn.Parameter, torch.Tensor | None] = {}

    def watch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of `parameters` from now on."""
        for parameter in parameters:
            if parameter.requires_grad and parameter not in self._watched:
                hook = functools.partial(self._before_accumulation, weakref.ref(parameter))
                self._watched[parameter] = Watched(len(self._watched), parameter.register_hook(hook))

    def unwatch(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Leave the gradients of `parameters` alone from now on."""
        for parameter in parameters:
            if parameter in self._watched:
                self._watched.pop(parameter).handle.remove()

    def _before_accumulation(self, reference: weakref.ref[torch.nn.Parameter], grad: torch.Tensor) -> None:
        parameter = reference()
        if parameter is None:
            return
        if self._backward != _torch.current_backward():
            self._begin()
        if parameter in self._earlier:
            return
        state: Watched = self._watched[parameter]
        state.is_local = state.is_local and parameter.grad is not None
        if not self.enabled and parameter.grad is not None and not state.is_local:
            raise CPError("no_sync() found gradients that are already summed over the ranks: call zero_grad() before it.")
        self._earlier[parameter] = None if state.is_local else parameter.grad
        if not state.is_local:
            parameter.grad = None

    def _begin(self) -> None:
        self._restore()  # a backward that failed left them set aside
        self._backward = _torch.current_backward()
        _torch.after_backward(self._finish)

    def _finish(self) -> None:
        self._backward = -1
        missing = [parameter for parameter in self._earlier if parameter.grad is None]
        if missing:
            self._restore()
            raise CPError(
                "torch.autograd.grad returned gradients of this rank's tokens only: use loss.backward(), or "
                'grad_sync="none" and add the gradients over the axis yourself.'
            )
        parameters = sorted(self._earlier, key=lambda parameter: self._watched[parameter].order)
        if self.enabled:
            for bucket in buckets([parameter.grad for parameter in parameters if parameter.grad is not None]):
                self._sum(bucket)
        for parameter in parameters:
            self._watched[parameter].is_local = not self.enabled
        self._restore()

    def _restore(self) -> None:
        """Add what was set aside to what came since."""
        for parameter, earlier in self._earlier.items():
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)
        self._earlier = {}

    def _sum(self, bucket: list[torch.Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in bucket])
        dist.all_reduce(flat, group=self.axis.process_group)
        for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
            grad.copy_(part.view_as(grad))

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Leave gradients local inside this context; the next backward outside sums them too."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


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
