"""Errors of Dynamo in our own words: the user's line, what it is about it, and what to do."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch._dynamo.exc import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    TorchRuntimeError,
    Unsupported,
    UserError,
)

from cpcompile import _torch
from cpcompile.capture.arguments import describe_call_inside, did_you_mean
from cpcompile.capture.faults import REMEDY, summary
from cpcompile.capture.lowering import VALUE_SIZE, break_text, line_of
from cpcompile.errors import TORCH, CPError, GraphBreakError, InputError, InternalError

DYNAMO_REMEDY = (
    "torch.compile(model, fullgraph=True) on one device tells whether torch alone can compile this model; if it can, please "
    "report this with the error above."
)


@contextlib.contextmanager
def clear_errors(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> Iterator[None]:
    """Let only errors of our own out of Dynamo while it compiles `forward`; what the program raises when it runs stays."""
    try:
        yield
    except BackendCompilerFailed as error:
        inner = error.inner_exception
        if isinstance(inner, (CPError, Warning)):
            raise inner from inner.__cause__
        raise InternalError(f"{summary(inner)}\n\n{REMEDY}") from inner
    except (Unsupported, UserError) as error:
        model = getattr(forward, "__self__", None)
        unknown = describe_call_inside(model, inputs, error.__cause__)
        if unknown:
            raise InputError(unknown + line_of(_torch.break_frames(error))) from None
        hooks = describe_hooks(model, error)
        raise GraphBreakError(hooks or describe_unsupported(error, meant(forward, inputs))) from None
    except TorchRuntimeError as error:
        raise InputError(describe_failure(error, inputs) + meant(forward, inputs)) from None
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        if "PendingUnbackedSymbolNotFound" in str(error):
            raise GraphBreakError(break_text(VALUE_SIZE, _torch.break_frames(error))) from error
        raise InternalError(f"Dynamo failed: {summary(error)}\n\n{DYNAMO_REMEDY}") from error


def meant(forward: Callable[..., Any], inputs: Mapping[str, Any]) -> str:
    """Return a sentence about inputs that the model may not know by their names, or ''."""
    return did_you_mean(inspect.signature(forward), inputs).replace(": did", " Did")


def describe_unsupported(error: TorchDynamoException, hint: str = "") -> str:
    """Return the text for a model that Dynamo cannot trace whole, with the user's line."""
    raised = re.search(r"raised exception (.*)", str(error))
    reason = f"it raises {raised[1]}" if raised else str(error)
    if isinstance(error.__cause__, TypeError) and reason.startswith("failed to bind arguments"):
        reason = f"it raises {summary(error.__cause__)}"
    text = break_text(reason, _torch.break_frames(error))
    return text + hint if raised else text


def describe_hooks(model: object, error: TorchDynamoException) -> str:
    """Return the text for backward hooks of modules inside the model, if they are why Dynamo gave up, or ''."""
    stack = _torch.break_frames(error)
    if not isinstance(model, torch.nn.Module) or not stack or stack[-1].filename != torch.nn.modules.module.__file__:
        return ""
    hooked = [path for path, module in model.named_modules() if path and _torch.has_backward_hooks(module)]
    if not hooked:
        return ""
    own = [frame for frame in stack if not frame.filename.startswith(TORCH)]
    return (
        f"backward hooks of modules inside the model cannot be traced: {', '.join(hooked)}.{line_of(own)}\n\n"
        "Remove them (handle.remove()). Forward hooks work, hooks of the whole model, and those of parameters (register_hook, "
        "register_post_accumulate_grad_hook), which see the gradients of one device."
    )


def describe_failure(error: TorchRuntimeError, inputs: Mapping[str, Any]) -> str:
    """Return the text for an operator of the model that fails on shapes and dtypes alone."""
    found = re.search(r"got (\w+)\((['\"])(.*)\2\)$", str(error), re.MULTILINE)
    reason = f"{found[1]}: {found[3]}" if found else summary(error)
    line = line_of(_torch.break_frames(error))
    given = ", ".join(describe(name, x) for name, x in inputs.items() if isinstance(x, torch.Tensor))
    return (
        f"the model fails on shapes and dtypes alone: {reason}{line}\n  inputs: {given or 'no tensors'}\n\n"
        "Check their dtypes (ids and labels are integers), shapes and devices, and run the model once on one device. Not every "
        "model can be traced on the meta device; those of transformers need use_cache=False there."
    )


def describe(name: str, x: torch.Tensor) -> str:
    """Return name, dtype, shape and device of an input."""
    return f"{name} {str(x.dtype).removeprefix('torch.')}{list(x.shape)} on {x.device}"
