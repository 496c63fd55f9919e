"""Last call: what a model's outputs are of, for functions that take one of them and the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cpcompile.capture.lowering import placeholders
from cpcompile.compile.outputs import Output, outputs_of
from cpcompile.compile.transform import Transformed
from cpcompile.inspect.explanation import Explanation


@dataclass(slots=True)
class LastCall:
    """The last call of a model.

    Attributes:
        lengths: tokens of each sequence.
        outputs: what it returned; their shapes are those of when it was compiled.
        bounds: where documents began, by the number of tokens.
        plan: what runs, or why nobody can tell.
    """

    lengths: Sequence[int] = ()
    outputs: Sequence[Output] = ()
    bounds: dict[int, torch.Tensor] = field(default_factory=dict)
    plan: Explanation | Exception | None = None


class CallReader:
    """Reads off the inputs of a graph what `LastCall` says."""

    def __init__(self, transformed: Transformed) -> None:
        self.outputs = outputs_of(transformed.graph)
        dims, nodes = transformed.plan.token_dims, placeholders(transformed.graph)
        self._tokens = [(i, dims[node.name]) for i, node in enumerate(nodes) if node.name in dims]
        self._fixed = [transformed.plan.num_tokens] if transformed.plan.num_tokens else []

    def lengths(self, inputs: Sequence[Any]) -> list[int]:
        """Return the tokens of each input that holds tokens."""
        return [*self._fixed, *(int(inputs[i].shape[dim]) for i, dim in self._tokens)]
