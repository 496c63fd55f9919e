"""The `torch.compile` backend: `torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.compile import compile_inner, transform_dynamo_graph
from cpcompile.config import Config
from cpcompile.errors import ConfigError, InputError
from cpcompile.grad_sync import GradientSync
from cpcompile.mesh import Axis, axis_of
from cpcompile.transform import Transformed


def backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile a Dynamo graph for this rank. `options` holds `mesh`, perhaps `axis`, and the fields of `cpcompile.Config`.

    Raises:
        CPError: the model cannot be sharded exactly; Dynamo reports it as the cause of its
            `BackendCompilerFailed`.
    """
    given = dict(options or {})
    if "mesh" not in given:
        raise ConfigError(
            'the mesh is missing: torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...}).'
        )
    axis = axis_of(given.pop("mesh"), given.pop("axis", None))
    config = Config.of(given)
    return Compiled(gm, example_inputs, config, gradient_sync(config, axis))


def gradient_sync(config: Config, axis: Axis) -> GradientSync:
    """Return what sums the gradients of one model; where a wrapper averages parameters, gradients count P-fold until then."""
    return GradientSync(axis, 1 / axis.world_size if config.grad_sync == "mean" else 1.0)


class Compiled:
    """One transformed and compiled graph; called with the flat inputs that Dynamo passes."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, sync: GradientSync) -> None:
        axis = sync.axis
        check_devices(example_inputs, axis)
        self.transformed: Transformed = transform_dynamo_graph(
            gm, example_inputs, config=config, world_size=axis.world_size, group=axis.group
        )
        self._run = compile_inner(self.transformed, example_inputs, config.inner)
        self._summed = [i for i, x in enumerate(example_inputs) if has_summed_gradient(x, config)]
        self._sync = sync

    def __call__(self, *inputs: Any) -> Any:
        given = list(inputs)
        if self._sync.axis.world_size > 1 and self._summed and torch.is_grad_enabled():
            for i, tensor in zip(self._summed, self._sync([inputs[i] for i in self._summed]), strict=True):
                given[i] = tensor
        return self._run(*given)


def has_summed_gradient(value: Any, config: Config) -> bool:
    """Tell whether the gradient of a graph input is summed here: with `mean`, a wrapper averages those of parameters."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad or config.grad_sync == "none":
        return False
    return config.grad_sync == "sum" or not isinstance(value, torch.nn.Parameter)


def check_devices(inputs: Sequence[Any], axis: Axis) -> None:
    """Check that the inputs are on devices of the mesh.

    Raises:
        InputError: a tensor is on another kind of device.
    """
    others = {x.device.type for x in inputs if isinstance(x, torch.Tensor)} - {axis.device_type}
    if others:
        raise InputError(
            f"the mesh is of {axis.device_type} devices, but the model or its inputs are on {', '.join(sorted(others))}: "
            f"move them with .to({axis.device_type!r}), or make the mesh of the other kind."
        )
