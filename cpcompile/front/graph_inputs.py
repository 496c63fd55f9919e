"""Graph inputs: what the model of a Dynamo graph is given and holds, as far as the inputs of the graph tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from cpcompile import _torch
from cpcompile.capture.lowering import placeholders
from cpcompile.compile.inner import input_names
from cpcompile.errors import clean_path


class GraphInputs:
    """Reads the flat inputs of a graph, as `front.statement.Model`. Modes of modules are no inputs: the graph itself has them."""

    def __init__(self, gm: fx.GraphModule) -> None:
        names = input_names(gm)
        self._given = [(names[node.name], i) for i, node in enumerate(placeholders(gm)) if node.name in names]
        others = [(node, i) for i, node in enumerate(placeholders(gm)) if node.name not in names]
        self._held = [(weight_name(_torch.source_name(node)), i) for node, i in others]
        self._weights: list[tuple[str, torch.Tensor]] = []

    def read(self, inputs: Sequence[Any]) -> dict[str, Any]:
        """Return by name what the model is given, and keep what it holds."""
        self._weights = [(name, inputs[i]) for name, i in self._held if isinstance(inputs[i], torch.Tensor)]
        return {name: inputs[i] for name, i in self._given}

    def weights(self) -> list[torch.Tensor]:
        """Return the tensors that the model holds."""
        return [x for _, x in self._weights]

    def weight_names(self) -> list[str]:
        """Return the names of `weights`."""
        return [name for name, _ in self._weights]

    def training(self) -> bytes:
        """Return nothing."""
        return b""

    def module_names(self) -> list[str]:
        """Return nothing."""
        return []


def weight_name(source: str) -> str:
    """Return the name of a weight as its model has it, `embed.weight`."""
    return clean_path(source).replace("_parameters.", "").replace("_buffers.", "")
