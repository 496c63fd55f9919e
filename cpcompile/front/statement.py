"""Statement: what one rank says of a call of its model, as bytes to compare and as texts to tell."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol

import torch

from cpcompile.front.fingerprint import text_fingerprint
from cpcompile.front.rank_agreement import Details
from cpcompile.front.weights import Watch, describe_weight, same_parts
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)


class Model(Protocol):
    """What a rank knows of its model."""

    def weights(self) -> list[torch.Tensor]:
        """Return all parameters and buffers."""

    def weight_names(self) -> list[str]:
        """Return the names of `weights`."""

    def training(self) -> bytes:
        """Return a byte for each module: is it in training mode."""

    def module_names(self) -> list[str]:
        """Return the paths of the modules of `training`."""


class Statement:
    """What a rank says of one call.

    Attributes:
        tensors: the tensors among the inputs, by ("input", name).
        header: stands for all that `details` says.
        kind: a fingerprint of what decides how the call is compiled, as far as it can be seen: without values and sizes.
        writes: a fingerprint of how often the weights were written.
    """

    def __init__(self, inputs: Mapping[str, Any], axis: Axis, model: Model, watch: Watch, *, holds_back: bool) -> None:
        self._model = model
        flat = dict(sorted(flattened(inputs)))  # the order of keyword arguments means nothing
        self._inputs = {name: describe(x) for name, x in flat.items()}
        self._settings = settings(axis) | {"cpcompile.no_sync": holds_back}
        self._training = model.training()
        weights = model.weights()
        self._trained = bytes([x.requires_grad for x in weights])
        self.writes = watch.look(model.weight_names, weights)
        self.tensors = {
            ("input", name): part
            for name, x in flat.items()
            if isinstance(x, torch.Tensor)
            for part in same_parts(x)[:1]
        }
        state = repr(self._settings).encode(), self._training, self._trained, repr(watch.layout).encode()
        self.header = repr((self._inputs, state)).encode()
        kinds = {
            name: (x.dtype, x.dim()) if isinstance(x, torch.Tensor) else type(x).__name__ for name, x in flat.items()
        }
        self.kind = text_fingerprint(repr((kinds, state)).encode())

    def details(self) -> Details:
        """Return what the header stands for."""
        names, weights = self._model.weight_names(), self._model.weights()
        modes = zip(self._model.module_names(), self._training, strict=True)
        return {
            **{("setting", name): str(value) for name, value in self._settings.items()},
            **{("training", path): "training" if is_training else "evaluation" for path, is_training in modes},
            **{("weight", name): describe(x) for name, x in zip(names, weights, strict=True)},
            **{("input", name): text for name, text in self._inputs.items()},
        }


def flattened(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values of a call by name, those inside dicts, lists and tuples too."""
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            yield from flattened({f"{name}[{key!r}]": x for key, x in value.items()})
        elif isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
            yield from flattened({f"{name}[{i}]": x for i, x in enumerate(value)})
        else:
            yield name, value


def describe(x: Any) -> str:
    """Return what must agree before values can; of an object of another class, only the class is known to be alike."""
    if isinstance(x, torch.Tensor):
        return describe_weight(x) + (", requires grad" if x.requires_grad else "")
    return repr(x) if isinstance(x, _PLAIN) else type(x).__qualname__


def settings(axis: Axis) -> dict[str, Any]:
    """Return what a call depends on that neither the model nor the inputs say."""
    device = axis.device_type
    return {
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "autocast": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "off",
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
    }


def fixed_details(config: Config, axis: Axis) -> Details:
    """Return what stays as long as the model does: versions and options."""
    own = import_module("cpcompile")  # by name: the package imports whatever is public when it is asked for
    versions = {"cpcompile": own.__version__, "torch": torch.__version__, "python": platform.python_version()}
    options = {name: dict(sorted(x.items())) if isinstance(x, Mapping) else x for name, x in asdict(config).items()}
    options["axis"] = f"{axis.world_size} ranks, {axis.inner_size or 'none'} of them exchange heads"
    return {
        **{("version", name): str(version) for name, version in versions.items()},
        **{("option", name): repr(value) for name, value in options.items()},
    }
