"""Generation: `model.generate` of a context-parallel model runs the untouched model, since decoding is not sharded."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch

SAID = (
    "generate() runs the untouched model whole on every rank, since decoding token by token is not sharded: "
    "pass the same prompts to all ranks."
)


class Generation:
    """What `apply` puts in place of a model's `generate`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        functools.update_wrapper(self, type(model).generate)

    @classmethod
    def replace(cls, model: torch.nn.Module) -> None:
        """Replace the method of a model, if its class has one; an instance's own is left to who put it there."""
        if callable(getattr(type(model), "generate", None)) and "generate" not in model.__dict__:
            model.__dict__["generate"] = cls(model)

    @classmethod
    def remove(cls, model: torch.nn.Module) -> None:
        """Undo `replace`."""
        if isinstance(model.__dict__.get("generate"), cls):
            del model.__dict__["generate"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(SAID, stacklevel=2)
        with self._model.forward.untouched():
            return type(self._model).generate(self._model, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generation:
        """Return the same for a copy of the model."""
        return Generation(copy.deepcopy(self._model, memo))
