"""Triton, if it is installed: torch for CPUs comes without it, and every module here can be imported all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

try:
    import triton
except ImportError:
    triton = None
tl: Any = triton and triton.language

# Annotations in kernels: a number known when a kernel is compiled, and any other value: a tensor, a pointer, a number, or
# a tuple of them. Triton reads them, and takes no name that is not its own.
if TYPE_CHECKING:
    constexpr: TypeAlias = Any
    Value: TypeAlias = Any
elif tl is None:
    constexpr = Value = float
else:
    constexpr, Value = tl.constexpr, tl.tensor


def has_triton() -> bool:
    """Whether Triton is installed."""
    return triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """Return the function as a Triton kernel, if Triton is installed."""
    return function if triton is None else triton.jit(function)


def on_device_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Launch kernels on the device of x: Triton takes the current one."""
    return torch.cuda.device(x.device.index) if x.is_cuda else nullcontext()


def constant(x: float) -> Any:
    """Return a number that kernels may name."""
    return x if tl is None else tl.constexpr(x)


LOG2_E = constant(1.4426950408889634)
LN_2 = constant(0.6931471805599453)
