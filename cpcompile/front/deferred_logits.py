"""Deferred logits: what a compiled call returns in the place of logits that only its loss has needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpcompile.compile.deferred_outputs import DeferredOutput
from cpcompile.errors import ConfigError
from cpcompile.front.deferred_tensor import DeferredTensor
from cpcompile.front.gradient_sums import GradientSync
from cpcompile.passes import sum_gradients

SHARDED = (
    "the logits were not made: the loss is computed in chunks of tokens, and fully_shard shards the weight of the head, which a "
    "rank that reads its logits cannot gather alone. logits='keep' makes them in every step."
)


class DeferredLogits:
    """Makes one output of a graph when it is read."""

    def __init__(self, deferred: DeferredOutput, summed: Sequence[int], sync: GradientSync) -> None:
        self.deferred, self.position = deferred, deferred.position
        self._sync, self._site = sync, sync.site()
        nodes = deferred.graph.graph.find_nodes(op="placeholder")
        self._summed = [i for i, given in enumerate(deferred.inputs) if given in summed]
        if not deferred.is_sharded:
            names = [nodes[i + 1].name for i in self._summed]  # hidden states come first
            sum_gradients(deferred.graph, summed=names, site=self._site.number)
            deferred.graph.recompile()

    def of(self, hidden: torch.Tensor, inputs: Sequence[Any], keys: Sequence[Any]) -> torch.Tensor:
        """Return the output, not made yet.

        Args:
            hidden: what the graph returned in its place.
            inputs: of the graph.
            keys: for each, what its gradient is kept under while none is summed.
        """
        given = [inputs[i] for i in self.deferred.inputs]
        known = [keys[i] for i in self.deferred.inputs]

        def make() -> torch.Tensor:
            if self.deferred.is_sharded:
                raise ConfigError(SHARDED)
            tensors = list(given)
            if self._summed and torch.is_grad_enabled():
                of_graph = self._sync(self._site, [given[i] for i in self._summed], [known[i] for i in self._summed])
                for i, tensor in zip(self._summed, of_graph, strict=True):
                    tensors[i] = tensor
            made: torch.Tensor = self.deferred.graph(hidden, *tensors)
            return made

        shape = (*hidden.shape[:-1], *self.deferred.inner)
        return DeferredTensor.of(make, shape, self.deferred.dtype, hidden.device, needs_grad=hidden.requires_grad)
