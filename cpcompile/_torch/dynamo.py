"""Dynamo and the compilers behind it: what it says of a graph, how it is kept to one, what compiles the result."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch._dynamo
import torch.fx.traceback
from torch import fx

from cpcompile._torch.functorch import TransformError as TransformError


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

    The limit of compilations for one function is raised: several models, plans or lengths may share a forward.
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
        with config.patch(ignore_logging_functions=ignored, recompile_limit=_RECOMPILE_LIMIT):
            yield
    finally:
        metrics.disabled = was_disabled
        flex._validate_device = validate


def break_frames(error: torch._dynamo.exc.TorchDynamoException) -> traceback.StackSummary:
    """Return the user's stack where Dynamo gave up, as far as the error knows it."""
    return traceback.StackSummary.from_list(getattr(error, "real_stack", []))


def inner_compiler(name: str) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return the function that compiles the transformed graph: `inductor`, `aot_eager` or `eager`."""
    if name == "eager":
        return lambda gm, inputs: gm
    if name == "aot_eager":
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        return aot_autograd(fw_compiler=nop, bw_compiler=nop)
    from torch._inductor.compile_fx import compile_fx

    return compile_fx  # type: ignore[return-value]
