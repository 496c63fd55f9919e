"""Module state: the weights of a model and what can be switched on each of its modules, read at each call in microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch

from cpcompile import _torch


class ModuleState:
    """Reads a model; what modules there are, and their names, is found again only when one was added, replaced or removed."""

    def __init__(self, model: torch.nn.Module) -> None:
        # The modules are looked for when they are first asked for: in the middle of a copy a model has none yet.
        self._model = model
        self._modules: dict[str, torch.nn.Module] = {}
        self._held: list[dict[str, Any]] = []
        self._sizes = [-1]  # of no model

    def training(self) -> bytes:
        """Return a byte for each module: is it in training mode. Finds the modules again if others are in their place."""
        if list(map(len, self._held)) != self._sizes or not all(map(is_, self._children(), self._found)):
            self._find()
        return bytes(map(attrgetter("training"), self._modules.values()))

    def module_names(self) -> list[str]:
        """Return the paths of the modules of `training`, 'the model' for itself."""
        return [path or "the model" for path in self._modules]

    def weights(self) -> list[torch.Tensor]:
        """Return all parameters and buffers; one that two modules share comes twice."""
        if not self._modules:
            self._find()
        return [x for x in chain.from_iterable(map(dict.values, self._tensors)) if x is not None]

    def weight_names(self) -> list[str]:
        """Return the names of `weights`."""
        return [
            f"{path}.{name}".lstrip(".")
            for path, module in self._modules.items()
            for held in _torch.holdings(module)[1:]
            for name, x in held.items()
            if x is not None
        ]

    def _children(self) -> Iterator[torch.nn.Module | None]:
        return chain.from_iterable(map(dict.values, self._submodules))

    def _find(self) -> None:
        self._modules = dict(self._model.named_modules())
        held = [_torch.holdings(module) for module in self._modules.values()]
        self._held = [each for of_module in held for each in of_module]
        self._sizes = list(map(len, self._held))
        # Most are empty, which takes as long to find out each time as to read the others.
        self._submodules = [submodules for submodules, _, _ in held if submodules]
        self._tensors = [tensors for _, *both in held for tensors in both if tensors]
        self._found = list(self._children())
