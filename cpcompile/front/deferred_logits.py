"""Deferred logits: what a compiled call returns in the place of logits that only its loss has needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpcompile.compile.deferred_outputs import DeferredOutput
from cpcompile.front.deferred_tensor import DeferredTensor
from cpcompile.front.gradient_sums import GradientSync
from cpcompile.passes import sum_gradients


class DeferredLogits:
    """Makes one output of a graph when it is read."""

    def __init__(self, deferred: DeferredOutput, summed: Sequence[int], sync: GradientSync) -> None:
        self.deferred, self.position = deferred, deferred.position
        self._sync, self._site = sync, sync.site()
        nodes = deferred.graph.graph.find_nodes(op="placeholder")
        self._summed = [i for i, given in enumerate(deferred.inputs) if given in summed]
        names = [nodes[i + 1].name for i in self._summed]  # hidden states come first
        sum_gradients(deferred.graph, summed=names, site=self._site.number)
        deferred.graph.recompile()

    def of(self, results: Sequence[Any], inputs: Sequence[Any], keys: Sequence[Any]) -> torch.Tensor:
        """Return the output, not made yet.

        Args:
            results: what the graph returned.
            inputs: of the graph.
            keys: for each, what its gradient is kept under while none is summed.
        """
        hidden, gathered = results[self.position], [results[i] for i in self.deferred.gathered]
        given = [inputs[i] for i in self.deferred.inputs]
        known = [keys[i] for i in self.deferred.inputs]

        def make() -> torch.Tensor:
            tensors = list(given)
            if self._summed and torch.is_grad_enabled():
                of_graph = self._sync(self._site, [given[i] for i in self._summed], [known[i] for i in self._summed])
                for i, tensor in zip(self._summed, of_graph, strict=True):
                    tensors[i] = tensor
            made: torch.Tensor = self.deferred.graph(hidden, *tensors, *gathered)
            return made

        shape = (*hidden.shape[:-1], *self.deferred.inner)
        return DeferredTensor.of(make, shape, self.deferred.dtype, hidden.device, needs_grad=hidden.requires_grad)
