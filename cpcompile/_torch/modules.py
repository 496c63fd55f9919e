"""Modules: what a module holds, as its own dicts, and how often a tensor was written. Read at each call, so it must be fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Holdings = tuple[dict[str, torch.nn.Module | None], dict[str, torch.Tensor | None], dict[str, torch.Tensor | None]]


def holdings(module: torch.nn.Module) -> Holdings:
    """Return the submodules, parameters and buffers that a module itself holds: the dicts that it changes, no copies."""
    return module._modules, module._parameters, module._buffers  # type: ignore[return-value]


def num_writes(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return how often each tensor was written in place; 0 for one made in inference mode, where nobody counts."""
    try:
        return [x._version for x in tensors]
    except RuntimeError:
        return [0 if x.is_inference() else x._version for x in tensors]


def inner_tensors(x: torch.Tensor) -> list[torch.Tensor] | None:
    """Return the plain tensors that one of a class such as a quantised weight is made of, or None for a plain tensor."""
    if not hasattr(x, "__tensor_flatten__"):
        return None
    return [getattr(x, name) for name in x.__tensor_flatten__()[0]]
