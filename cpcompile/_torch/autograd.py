"""Autograd and asserts: what the public functions do not let through."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch._dynamo
import torch.fx.traceback
from torch._dynamo import compiled_autograd
from torch._library.custom_ops import CustomOpDef as CustomOpDef

from cpcompile._torch.functorch import TransformError as TransformError


def assert_on_device(condition: torch.Tensor, message: str) -> None:
    """Raise `RuntimeError` unless a scalar is true; on a GPU when the device gets there, so that the host need not wait."""
    torch._assert_async(condition, message)


def run_backward(loss: torch.Tensor) -> None:
    """Back-propagate from a scalar with the active torch function mode kept: `Tensor.backward` switches it off."""
    ones = torch.ones_like(loss)
    torch.autograd.graph._engine_run_backward(
        (loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def backward_number() -> int:
    """Return the number of the backward that autograd runs in this thread, -1 for none."""
    return torch._C._current_graph_task_id()


@contextlib.contextmanager
def recording_gradients() -> Iterator[None]:
    """Let operators record for autograd also inside a custom operator, whose body runs below autograd.

    What it records is differentiated at once: compiled autograd has no part in it (its switch, torch 2.11 to 2.13).
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False), compiled_autograd._disable():
        yield
