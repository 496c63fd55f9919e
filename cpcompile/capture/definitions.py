"""Definitions: the functions behind a model that Dynamo takes for unchanging, so that a model with others is compiled again.

Dynamo compiles again when attributes, submodules, tensors or the hooks of a module change. It does not look at hooks of all
modules, nor at the functions of classes, which patches of libraries replace (`LlamaMLP.forward = faster`).
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from cpcompile import _torch


class Definitions:
    """The functions of the classes of a model's modules, and the hooks of all modules, as they were when it was compiled."""

    def __init__(self, model: object) -> None:
        self._model = model
        self._of_class: list[tuple[type, dict[str, Any]]] = []
        self._hooks: tuple[Any, ...] = ()

    def remember(self) -> None:
        """Take what is defined now as what is compiled."""
        modules = self._model.modules() if isinstance(self._model, nn.Module) else ()
        classes = {cls: None for module in modules for cls in type(module).__mro__ if is_watched(cls)}
        self._of_class = [(cls, functions_of(cls)) for cls in classes]
        self._hooks = _torch.global_hooks()

    def have_changed(self) -> bool:
        """Tell whether something else is defined than what was compiled; False before anything was."""
        for cls, functions in self._of_class:
            now = vars(cls)
            for name, function in functions.items():
                if now.get(name) is not function:
                    return True
        return bool(self._of_class) and self._hooks != _torch.global_hooks()


def functions_of(cls: type) -> dict[str, Any]:
    """Return the functions that a class defines itself; for its calls, None where it inherits them."""
    calls = {name: vars(cls).get(name) for name in ("forward", "__call__")}
    return calls | {name: value for name, value in vars(cls).items() if isinstance(value, FunctionType)}


def is_watched(cls: type) -> bool:
    """Tell whether the functions of a class may be replaced: those of `nn.Module` and what is no module are let alone."""
    return issubclass(cls, nn.Module) and cls is not nn.Module
