"""State: what a run of a model leaves behind, in the model and in its inputs, so that the next run begins where it began."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Tensor = torch.Tensor


class State:
    """A model as it is now: parameters, buffers, and all that its modules hold (mode, counters, hooks, tensors kept)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._tensors = tensors_of(model)
        self._values = {name: x.detach().clone() for name, x in self._tensors.items()}
        self._requires_grad = {name: x.requires_grad for name, x in self._tensors.items()}
        self._attributes = [(vars(module), attributes_of(module)) for module in model.modules()]

    def changes(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that are not what they were, as the model holds them now."""
        now = tensors_of(self.model)
        return {name: x for name, x in now.items() if name not in self._values or not is_same(x, self._values[name])}

    def of(self, name: str) -> Tensor | None:
        """Return the value that a parameter or buffer had, or None for one that did not exist."""
        return self._values.get(name)

    def restore(self) -> None:
        """Make the model what it was: the same objects with the same values."""
        for found, kept in self._attributes:
            put_back(found, {name: value for name, (value, _) in kept.items()})
            for value, content in kept.values():
                if isinstance(value, dict):
                    put_back(value, content)
                elif isinstance(value, list) and not are_same_items(value, content):
                    value[:] = content
        with torch.no_grad():
            for name, x in self._tensors.items():
                x.requires_grad_(self._requires_grad[name])
                if not is_same(x, self._values[name]):
                    x.copy_(self._values[name])


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def attributes_of(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return the attributes of a module, each with what it holds now if it is a dict or a list."""
    return {name: (value, content_of(value)) for name, value in vars(module).items()}


def content_of(value: Any) -> Any:
    """Return what is in a dict or a list, None for all else."""
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else None


def put_back(found: dict[Any, Any], kept: Mapping[Any, Any]) -> None:
    """Make a dict hold what it held, in that order; one that does is left alone, for what guards it."""
    if list(found) == list(kept) and all(found[name] is value for name, value in kept.items()):
        return
    found.clear()
    found.update(kept)


def are_same_items(found: list[Any], kept: list[Any]) -> bool:
    """Tell whether two lists hold the same objects."""
    return len(found) == len(kept) and all(a is b for a, b in zip(found, kept, strict=True))


def is_same(x: Tensor, value: Tensor) -> bool:
    """Tell whether a tensor has a value; NaN is no value."""
    return x.shape == value.shape and x.dtype == value.dtype and torch.equal(x, value)


def own_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs with tensors of their own, which a run may write and whose gradients nobody else sees."""
    copies: dict[int, Tensor] = {}

    def own(x: Tensor) -> Tensor:
        if id(x) not in copies:
            copies[id(x)] = x.detach().clone().requires_grad_(x.requires_grad)
            vars(copies[id(x)]).update(vars(x))  # dims that the user marked as dynamic
        return copies[id(x)]

    return {name: torch.utils._pytree.tree_map_only(torch.Tensor, own, x) for name, x in inputs.items()}
