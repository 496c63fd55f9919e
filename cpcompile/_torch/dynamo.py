"""Dynamo and the compilers behind it: what it says of a graph, how it is kept to one, what compiles the result."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.fx.traceback
from torch import fx
from torch._dynamo.callback import CallbackTrigger, callback_handler
from torch._dynamo.variables.tensor import TensorVariable
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from cpcompile._torch.functorch import TransformError as TransformError

# Not errors: by these Dynamo begins anew or leaves a frame alone.
CONTROL_FLOW: tuple[type[BaseException], ...] = (torch._dynamo.exc.RestartAnalysis, torch._dynamo.exc.SkipFrame)
DATA_DEPENDENT: tuple[type[BaseException], ...] = (GuardOnDataDependentSymNode,)


def source_name(node: fx.Node) -> str:
    """Return where Dynamo found the value of a placeholder, e.g. `L['kwargs']['input_ids']`, or ''."""
    name = getattr(getattr(node.meta.get("grapharg"), "source", None), "name", "")
    return str(name() if callable(name) else name)  # a method until torch 2.12, an attribute since


def forget_dynamic(x: torch.Tensor) -> None:
    """Take back what `torch._dynamo.maybe_mark_dynamic` said of a tensor. Checked on torch 2.11 to 2.14."""
    known = vars(x)
    known.pop("_dynamo_weak_dynamic_indices", None)
    if not {"_dynamo_dynamic_indices", "_dynamo_static_indices"} & known.keys():
        known.pop("_has_dynamo_dim_marking", None)


def dynamo_break_reason(gm: fx.GraphModule) -> Any | None:
    """Return why Dynamo ended the graph before the end of the function (with `.reason`, `.user_stack`), or None."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason if reason is not None and reason.graph_break else None


def recompilation_reason() -> str:
    """Return why what Dynamo compiles now is compiled again: the guard that failed first; '' for the first compilation.

    torch keeps it with the metrics of a compilation alone. Checked on torch 2.13; where they are kept otherwise it is ''.
    """
    context = getattr(torch._dynamo.utils, "get_metrics_context", lambda: None)()
    reason = str(getattr(context, "_metrics", {}).get("recompile_reason") or "")
    return re.sub(r"^\d+/\d+: ", "", reason.partition("\n")[0].partition("  #")[0])


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


def _identity_for_new_leaves(original: Callable[..., Any]) -> Callable[..., Any]:
    """Return `TensorVariable.method_requires_grad_` for which an intermediate value only seems to be a leaf of autograd.

    Dynamo (2.13) traces `requires_grad_()` on a value of the graph, and refuses it when an output depends on it. The gradients of
    everything else are the same without: a graph knows by itself which of them it needs. Only the `.grad` of the value would
    differ, so its node is marked; inputs and `requires_grad_(False)` are left to Dynamo.
    """

    def method(self: Any, tx: Any, requires_grad: Any = True) -> Any:
        wanted = requires_grad if isinstance(requires_grad, bool) else requires_grad.as_python_constant()
        node = self.as_proxy().node
        value = node.meta["example_value"]
        is_new_leaf = wanted and not value.requires_grad and not self.source
        if not is_new_leaf or torch._C._functorch.peek_interpreter_stack() is not None:
            return original(self, tx, requires_grad)
        value.requires_grad_()
        self.requires_grad = True  # for code of the model that asks
        node.meta[_LEAF] = True
        return self

    return method


_LEAF = "cpcompile_leaf"


def is_new_leaf(node: fx.Node) -> bool:
    """Tell whether the model called `requires_grad_()` on a value that it had computed, of a Dynamo graph."""
    return _LEAF in node.meta


@contextlib.contextmanager
def tracing_one_graph() -> Iterator[None]:
    """Let Dynamo skip logging calls and warnings, so that a model that logs once still traces as one graph.

    The limit of compilations for one function is raised: several models, plans or lengths may share a forward. A module that
    has got a hook since is compiled again, which Dynamo does not look for by default.
    `requires_grad_()` is traced on values that the model computes. Flex attention is traced on any device, because it is opened:
    what it lacks on some is a kernel for its backward.
    """
    import torch._dynamo.config as config
    import torch.nn.attention.flex_attention as flex

    methods = {getattr(logging.Logger, name) for name in _LOGGING if hasattr(logging.Logger, name)}
    ignored = config.ignore_logging_functions | methods | {warnings.warn}
    metrics = logging.getLogger("torch._dynamo.metrics_context")
    was_disabled, metrics.disabled = metrics.disabled, metrics.disabled or _METRICS_MISREAD_CONFIG
    validate, flex._validate_device = flex._validate_device, _on_any_device
    require = TensorVariable.method_requires_grad_
    TensorVariable.method_requires_grad_ = _identity_for_new_leaves(require)  # type: ignore[method-assign]
    try:
        with config.patch(
            ignore_logging_functions=ignored, recompile_limit=_RECOMPILE_LIMIT, skip_nnmodule_hook_guards=False
        ):
            yield
    finally:
        metrics.disabled = was_disabled
        flex._validate_device = validate
        TensorVariable.method_requires_grad_ = require  # type: ignore[method-assign]


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


def break_frames(error: Exception) -> traceback.StackSummary:
    """Return the user's stack where Dynamo gave up, as far as the error knows it: some only have it in their text."""
    told = re.findall(r'File "(.*)", line (\d+), in (\S+)', str(error).partition("from user code:")[2])
    of_text = [traceback.FrameSummary(file, int(line), name) for file, line, name in told]
    return traceback.StackSummary.from_list(getattr(error, "real_stack", None) or of_text)


@contextlib.contextmanager
def when_tracing(start: Callable[[], Any]) -> Iterator[None]:
    """Call `start` when Dynamo begins to trace in this context (`torch._dynamo.callback`, torch 2.11 to 2.13)."""

    def begun(args: Any) -> None:
        if args.callback_trigger is CallbackTrigger.DYNAMO:
            start()

    callback_handler.register_start_callback(begun)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() forgets all callbacks
            callback_handler.remove_start_callback(begun)
