"""Known values: while Dynamo traces, tensors that are made of numbers alone have values, which decide sizes and branches."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._dynamo.symbolic_convert import InliningInstructionTranslator, InstructionTranslator
from torch._dynamo.variables import ConstantVariable, TensorVariable
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.utils import _pytree
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten
_FACTORIES = {
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.full.default,
    aten.ones.default,
    aten.zeros.default,
}
_MOST = 1 << 16  # elements of a tensor whose values are worth keeping


def _deciding(handler: Any) -> Callable[..., Any]:
    """Return what Dynamo does at a branch, with a number in place of a tensor that has a value."""

    def decide(tx: Any, instruction: Any) -> Any:
        value = tx.stack[-1]
        node = value.as_proxy().node if isinstance(value, TensorVariable) else None
        known = None if node is None else known_value(node)
        if known is not None and known.numel() == 1:
            tx.stack[-1] = ConstantVariable.create(known.item())
        return handler(tx, instruction)

    return decide


@contextlib.contextmanager
def _known_branches() -> Iterator[None]:
    """Let Dynamo take the branch that a known value says."""
    tables = [cls.dispatch_table for cls in (InstructionTranslator, InliningInstructionTranslator)]
    codes = [code for name, code in dis.opmap.items() if "JUMP" in name and "IF" in name and "NONE" not in name]
    before = [[table[code] for code in codes] for table in tables]
    for table in tables:
        for code in codes:
            table[code] = _deciding(table[code])
    try:
        yield
    finally:
        for table, handlers in zip(tables, before, strict=True):
            for code, handler in zip(codes, handlers, strict=True):
                table[code] = handler


@contextlib.contextmanager
def known_values(most: int = _MOST) -> Iterator[None]:
    """Let fake tensors keep the values of integers that are made of numbers: `torch.tensor([2, 3])`, `torch.arange(4)`.

    `FakeTensorMode` does so for tensors of one element, and for what is computed of them alone (torch 2.11 to 2.14).
    """
    dispatch = FakeTensorMode.dispatch

    def keeping(mode: FakeTensorMode, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = dispatch(mode, func, types, args, kwargs or {})
        if func not in _FACTORIES or not isinstance(made, FakeTensor) or made.constant is not None:
            return made
        is_integral = not made.is_floating_point() and not made.is_complex()
        is_number = not any(isinstance(x, torch.SymInt) for x in _pytree.tree_leaves((args, kwargs)))
        if not is_integral or not is_number or made.device.type == "meta" or made.numel() > most:
            return made
        with _disable_current_modes():
            real = func(*args, **(kwargs or {}))
        return mode.fake_tensor_converter.from_real_tensor(mode, real, make_constant=True)

    before, fake_tensor.CONSTANT_NUMEL_LIMIT = fake_tensor.CONSTANT_NUMEL_LIMIT, most
    FakeTensorMode.dispatch = keeping  # type: ignore[method-assign, assignment]
    try:
        with _known_branches():
            yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT = before
        FakeTensorMode.dispatch = dispatch  # type: ignore[method-assign]


def known_value(node: fx.Node) -> torch.Tensor | None:
    """Return the integers that a node of a Dynamo graph always holds, if neither it nor a view of it is written to; else None."""
    example = node.meta.get("example_value")
    value = example.constant if isinstance(example, FakeTensor) else None
    return None if value is None or value._version or value.is_floating_point() or value.is_complex() else value
