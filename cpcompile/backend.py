"""The `torch.compile` backend: `torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...})`."""

from __future__ import annotations

import functools
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
        CPError: the model cannot be sharded exactly; Dynamo reports it as the cause of its `BackendCompilerFailed`.
    """
    given = dict(options or {})
    if "mesh" not in given:
        raise ConfigError('the mesh is missing: torch.compile(model, backend="cpcompile", options={"mesh": mesh, ...}).')
    axis = axis_of(given.pop("mesh"), given.pop("axis", None))
    config = Config.of(given)
    return Compiled(gm, example_inputs, config, axis)


class Compiled:
    """One transformed and compiled graph; called with the flat inputs that Dynamo passes."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, axis: Axis) -> None:
        check_devices(example_inputs, axis)
        self.transformed: Transformed = transform_dynamo_graph(
            gm, example_inputs, config=config, world_size=axis.world_size, group=axis.group
        )
        self._run = compile_inner(self.transformed, example_inputs, config.inner)
        self._parameters = [i for i, x in enumerate(example_inputs) if isinstance(x, torch.nn.Parameter)]
        self._sync = gradient_sync(axis) if config.grad_sync == "sum" and axis.world_size > 1 else None

    def __call__(self, *inputs: Any) -> Any:
        if self._sync is not None and torch.is_grad_enabled():
            # One graph may serve several modules, so the parameters are those of this call.
            self._sync.watch(inputs[i] for i in self._parameters)
        return self._run(*inputs)


@functools.lru_cache(maxsize=None)
def gradient_sync(axis: Axis) -> GradientSync:
    """Return the one gradient synchroniser of an axis."""
    return GradientSync(axis)


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
