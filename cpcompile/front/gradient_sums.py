"""Gradient sums: what leaves the transformed graph as a gradient is the sum over the axis.

Each rank back-propagates its own tokens' part, so the parts add up to the single-device gradient. The sum is taken where
gradients leave the graph, not where they reach `.grad`: what else a parameter is used for (a penalty, another model, earlier
micro-batches) is not the graph's to sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from cpcompile.front.parameter_group import parameter_group
from cpcompile.options.mesh import Axis
from cpcompile.runtime.parameters.gradient_sums import GradientSums, Site


class GradientSync:
    """Sums the gradients of one model over an axis."""

    def __init__(self, axis: Axis, scale: float = 1.0) -> None:
        self.axis, self.sums = axis, GradientSums(scale)

    @property
    def enabled(self) -> bool:
        """Whether gradients are summed at the end of a backward that runs now."""
        return self.sums.enabled

    def site(self) -> Site:
        """Return a site for the graph that is being compiled."""
        return Site(self.sums)

    def __call__(
        self, site: Site, tensors: Sequence[torch.Tensor], keys: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return `tensors`, inputs of the graph of `site`, such that their gradients are sums over the axis.

        The first call is collective.
        `keys` are the same at each call: gradients that `no_sync` keeps back are kept under them.
        """
        if self.sums.group is None:
            self.sums.group = parameter_group(self.axis.process_group, self.axis)
        site.set_keys(keys)
        return FinishSums.apply(self.sums, keys, *tensors)  # type: ignore[no-any-return, no-untyped-call]

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Keep gradients back inside this context; the next backward outside sums and delivers them too."""
        before, self.sums.enabled = self.sums.enabled, False
        try:
            yield
        finally:
            self.sums.enabled = before


class FinishSums(torch.autograd.Function):
    """Identity on the inputs of a graph; backward runs once, when the graph has started all sums."""

    @staticmethod
    def forward(
        ctx: Any, sums: GradientSums, keys: Sequence[torch.Tensor], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.keys = sums, keys
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        return None, None, *ctx.sums.finish(ctx.keys, grads)
