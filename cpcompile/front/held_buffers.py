"""Held buffers: what was read from buffers when a graph was compiled must still be in them when it runs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.analysis.masks.held_tensors import found_in
from cpcompile.capture.lowering import placeholders
from cpcompile.errors import CPError
from cpcompile.front.graph_inputs import weight_name
from cpcompile.ir.annotation import annotation

REMEDY = (
    "Call torch._dynamo.reset(): the next call reads it again. If it changes from step to step, compute it in forward, or "
    "give it to the model as an argument."
)


@dataclass(slots=True)
class HeldBuffer:
    """A buffer whose values the graph was made for: the tensor that had them last, and its version then."""

    name: str
    found: object
    tensor: weakref.ref[torch.Tensor]
    version: int

    def is_untouched(self, tensor: torch.Tensor) -> bool:
        """Tell whether this is the tensor as it was; one made in inference mode tells nothing of its writes."""
        return self.tensor() is tensor and not tensor.is_inference() and tensor._version == self.version


class HeldBuffers:
    """Compares the buffers that a graph was made for with those that it is given."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._buffers: dict[int, HeldBuffer] = {}
        for i, node in enumerate(placeholders(gm)):
            if any(found is not None for found in annotation(node).held):
                (found,), example = annotation(node).held, node.meta["grapharg"].example
                name = weight_name(_torch.source_name(node))
                self._buffers[i] = HeldBuffer(name, found, weakref.ref(example), version_of(example))

    def check(self, inputs: Sequence[Any]) -> None:
        """Read again what has been written since.

        Raises:
            CPError: a buffer holds another thing than when the graph was compiled.
        """
        for i, buffer in self._buffers.items():
            if buffer.is_untouched(inputs[i]):
                continue
            if found_in(inputs[i].detach()) != buffer.found:
                raise CPError(
                    f"the buffer {buffer.name} {list(inputs[i].shape)} was changed since the model was compiled, which took "
                    f"what it held for a mask, a bias or places.\n\n{REMEDY}"
                )
            buffer.tensor, buffer.version = weakref.ref(inputs[i]), version_of(inputs[i])


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written, as far as it knows."""
    return -1 if tensor.is_inference() else tensor._version
