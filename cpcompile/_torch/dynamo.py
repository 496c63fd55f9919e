"""Dynamo and the compilers behind it: what it says of a graph, how it is kept to one, what compiles the result."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.fx.traceback
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cpcompile._torch.functorch import TransformError as TransformError

# Not errors: by these Dynamo begins anew or leaves a frame alone.
CONTROL_FLOW: tuple[type[BaseException], ...] = (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame)
DATA_DEPENDENT: tuple[type[BaseException], ...] = (GuardOnDataDependentSymNode,)


def source_name(node: fx.Node) -> str:
    """Return where Dynamo found the value of a placeholder, e.g. `L['kwargs']['input_ids']`, or ''."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.12, an attribute since


def dynamo_break_reason(gm: fx.GraphModule) -> Any | None:
    """Return why Dynamo ended the graph before the end of the function (with `.reason`, `.user_stack`), or None."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


_LOGGING = (
    "debug",
    "info",
    "warning",
    "error",
    "exception",
    "critical",
    "log",
    "warning_once",
    "info_once",
    "warning_advice",
)


_RECOMPILE_LIMIT = 256


# Before torch 2.13, the log of compilation metrics fails, harmlessly but loudly, on a config that ignores functions.
_METRICS_MISREAD_CONFIG = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)


def _on_any_device(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Stand in for the check of flex attention that its backward has a kernel on the device."""


@contextlib.contextmanager
def tracing_one_graph() -> Iterator[None]:
    """Let Dynamo skip logging calls and warnings, so that a model that logs once still traces as one graph.

    The limit of compilations for one function is raised: several models, plans or lengths may share a forward. A module that
    has got a hook since is compiled again, which Dynamo does not look for by default.
    Flex attention is traced on any device, because it is opened: what it lacks on some is a kernel for its backward.
    """
    import torch._dynamo.config as config
    import torch.nn.attention.flex_attention as flex

    methods = {getattr(logging.Logger, name) for name in _LOGGING if hasattr(logging.Logger, name)}
    ignored = config.ignore_logging_functions | methods | {warnings.warn}
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    was_disabled, metrics.disabled = metrics.disabled, metrics.disabled or _METRICS_MISREAD_CONFIG
    validate, flex._validate_device = flex._validate_device, _on_any_device
    try:
        with config.patch(
            ignore_logging_functions=ignored, recompile_limit=_RECOMPILE_LIMIT, skip_nnmodule_hook_guards=False
        ):
            yield
    finally:
        metrics.disabled = was_disabled
        flex._validate_device = validate


def guard_on_hooks() -> None:
    """Let Dynamo compile again when a module has got a hook since, which it does not look for by default."""
    torch._dynamo.config.skip_nnmodule_hook_guards = False


def has_backward_hooks(module: torch.nn.Module) -> bool:
    """Tell whether a module has hooks of its backward."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


_HOOKS_OF_ALL = [
    getattr(torch.nn.modules.module, f"_global_{kind}_hooks")
    for kind in ("forward", "forward_pre", "backward", "backward_pre")
]


def global_hooks() -> tuple[Any, ...]:
    """Return the hooks of all modules, those of forward and those of backward."""
    return tuple(hook for hooks in _HOOKS_OF_ALL for hook in hooks.values())


def break_frames(error: torch._dynamo.exc.TorchDynamoException) -> traceback.StackSummary:
    """Return the user's stack where Dynamo gave up, as far as the error knows it."""
    return traceback.StackSummary.from_list(getattr(error, "real_stack", []))
