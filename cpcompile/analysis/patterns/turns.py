"""Turns of a loop: what an unrolled loop computes in each turn, computed for all turns by one operator.

before  stack([q[:, 0] @ w, q[:, 1] @ w, q[:, 2] @ w], 1)
after   movedim(movedim(q, 1, 0) @ w, 0, 1)                                # the turns are the first dim
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import is_function
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import JOINS, Call, is_tensor, value_of
from cpcompile.rules.pointwise import pointwise
from cpcompile.rules.registry import RULES, IndexedRule

aten = torch.ops.aten


class NotOneLoop(Exception):
    """Turns are not the same operators, or not such as run for all turns at once."""


@dataclass(frozen=True, slots=True)
class Turns:
    """A tensor for each turn, `[turns, ...]`, or one that all turns share, as it is."""

    node: fx.Node
    is_shared: bool = False

    @property
    def dims(self) -> int:
        """The number of dims that it has in one turn."""
        return int(value_of(self.node).dim()) - (not self.is_shared)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Its sizes in one turn."""
        return tuple(value_of(self.node).shape[not self.is_shared :])


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes operators for all turns before a node, which is the last of the loop."""

    before: fx.Node

    def insert(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call."""
        return insert_call(self.before, target, *args, **kwargs)

    def aligned(self, x: Turns, dims: int) -> fx.Node:
        """Return a tensor that has so many dims in one turn, or broadcasts to it."""
        node = x.node
        for _ in range(0 if x.is_shared else dims - x.dims):
            node = self.insert(aten.unsqueeze.default, node, 1)
        return node

    def ranked(self, x: Turns, dims: int) -> Turns:
        """Return a tensor of so many dims in one turn, with dims of size 1 in front."""
        node = x.node
        for _ in range(dims - x.dims):
            node = self.insert(aten.unsqueeze.default, node, int(not x.is_shared))
        return Turns(node, x.is_shared)

    def of_turns(self, target: Any, x: Turns, *dims: int) -> Turns:
        """Apply an operator along dims, counted from the front of one turn."""
        return Turns(self.insert(target, x.node, *(dim + (not x.is_shared) for dim in dims)), x.is_shared)

    def permuted(self, x: Turns, order: Sequence[int]) -> Turns:
        """Put the dims of one turn in another order."""
        order = list(order) if x.is_shared else [0, *(dim + 1 for dim in order)]
        return Turns(self.insert(aten.permute.default, x.node, order), x.is_shared)

    def elementwise(self, target: Any, *operands: Any, **kwargs: Any) -> Turns:
        """Apply an operator that broadcasts."""
        dims = max(x.dims for x in operands if isinstance(x, Turns))
        args = [self.aligned(x, dims) if isinstance(x, Turns) else x for x in operands]
        is_shared = all(x.is_shared for x in operands if isinstance(x, Turns))
        return Turns(self.insert(target, *args, **kwargs), is_shared)

    def product(self, a: Turns, b: Turns) -> Turns:
        """Multiply matrices."""
        if min(a.dims, b.dims) < 2:
            raise NotOneLoop
        return self.elementwise(aten.matmul.default, a, b)

    def each(self, x: Turns, count: int, shape: Sequence[Any]) -> fx.Node:
        """Return `[turns, *shape]`, for something that broadcasts to it."""
        node = self.aligned(x, len(shape))
        while value_of(node).dim() < len(shape) + 1:
            node = self.insert(aten.unsqueeze.default, node, 0)
        sizes = value_of(node).shape
        if all(str(size) == str(wanted) for size, wanted in zip(sizes, (count, *shape), strict=True)):
            return node
        if not all(
            isinstance(wanted, int) or str(size) == str(wanted) for size, wanted in zip(sizes[1:], shape, strict=True)
        ):
            raise NotOneLoop
        kept = [-1 if str(size) == str(wanted) else wanted for size, wanted in zip(sizes[1:], shape, strict=True)]
        return self.insert(aten.expand.default, node, [count, *kept])


def shifted_dims(name: str, call: Call, value: Any) -> Any:
    """Return an argument that names dims, counted with the turns in front."""
    rank = (
        value_of(call.node).dim()
        if call.target is aten.unsqueeze.default
        else value_of(next(iter(call.operands()))[1]).dim()
    )
    return [int(d) % rank + 1 for d in value] if isinstance(value, list | tuple) else int(value) % rank + 1


JOINERS = {aten.stack.default, *JOINS}
# Operators that name dims of their operand, and which arguments do.
DIMS = {
    aten.transpose.int: ("dim0", "dim1"),
    aten.swapaxes.default: ("axis0", "axis1"),
    aten.unsqueeze.default: ("dim",),
    aten.squeeze.dim: ("dim",),
    aten.select.int: ("dim",),
    aten.slice.Tensor: ("dim",),
    aten.sum.dim_IntList: ("dim",),
    aten.mean.dim: ("dim",),
    aten.softmax.int: ("dim",),
}


def is_pointwise(target: Any) -> bool:
    """Tell whether an operator computes each element from those at its place, after broadcasting."""
    rule = RULES.get(target)
    return isinstance(rule, IndexedRule) and rule.indices is pointwise and is_function(target)


def apply(writer: Writer, call: Call, operands: dict[str, Turns]) -> Turns:
    """Write the operator of one turn for all of them.

    Raises:
        NotOneLoop: it is none that this knows.
    """
    shared = all(x.is_shared for x in operands.values())
    if is_pointwise(call.target):
        dims = max(x.dims for x in operands.values())
        args, kwargs = call.rebound({name: writer.aligned(x, dims) for name, x in operands.items()})
        return Turns(writer.insert(call.target, *args, **kwargs), shared)
    if call.target is aten.matmul.default:
        return writer.product(operands["self"], operands["other"])
    if call.target is aten.mT.default:
        return Turns(writer.insert(aten.transpose.int, operands["self"].node, -2, -1), shared)
    if call.target in DIMS and len(operands) == 1 and all(call[name] is not None for name in DIMS[call.target]):
        changes: dict[str, Any] = {name: x.node for name, x in operands.items()}
        if not shared:
            changes |= {name: shifted_dims(name, call, call[name]) for name in DIMS[call.target]}
        args, kwargs = call.rebound(changes)
        return Turns(writer.insert(call.target, *args, **kwargs), shared)
    if call.target in JOINERS and not shared:
        count = next(value_of(x.node).shape[0] for x in operands.values() if not x.is_shared)
        parts = [writer.each(x, count, call.shape(name)) for name, x in operands.items()]
        return Turns(writer.insert(call.target, parts, int(call["dim"]) % call.result.dim() + 1))
    if call.target is aten.permute.default and not shared:
        dims = shifted_dims("dims", call, call["dims"])
        return Turns(writer.insert(aten.permute.default, operands["self"].node, [0, *dims]))
    raise NotOneLoop


def read_of(node: Any) -> tuple[fx.Node, int, int] | None:
    """Return the tensor, the dim and the index of what reads one element along a dim."""
    if not isinstance(node, fx.Node):
        return None
    if node.target is aten.select.int:
        call = Call.of(node)
        dim, index = call.dim("dim", "self"), call["index"]
        size = call.shape("self")[dim]
        return (call["self"], dim, index % size) if isinstance(index, int) and isinstance(size, int) else None
    made, index = node.args[:2] if node.target is operator.getitem else (None, None)
    if isinstance(made, fx.Node) and made.target is aten.unbind.int and isinstance(index, int):
        call = Call.of(made)
        return call["self"], call.dim("dim", "self"), index % len(call.result)
    return None


def operands_of_turns(calls: Sequence[Call], number: Callable[[fx.Node], int]) -> dict[str, tuple[fx.Node, ...]]:
    """Return the operands of the same operator in each turn.

    Raises:
        NotOneLoop: it is not the same one, or has other arguments.
    """
    first = calls[0]
    names = [name for name, _ in first.operands()]
    for call in calls:
        if call.target is not first.target or [name for name, _ in call.operands()] != names:
            raise NotOneLoop
        for name, value in call.arguments.items():
            if not is_tensor(value) and not _same(value, first[name], number):
                raise NotOneLoop
    found = [dict(call.operands()) for call in calls]
    return {name: tuple(operands[name] for operands in found) for name in names}


def _same(a: Any, b: Any, number: Callable[[fx.Node], int]) -> bool:
    """Tell whether two arguments that are no tensors are the same; tensors in lists are compared elsewhere."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y, number) for x, y in zip(a, b, strict=True))
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return is_tensor(a) or number(a) == number(b)
    return type(a) is type(b) and bool(a == b)
