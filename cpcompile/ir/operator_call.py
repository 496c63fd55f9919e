"""Operator call: the arguments of an ATen node, bound once to the operator's schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

aten = torch.ops.aten

JOINS = {aten.cat.default, aten.concat.default, aten.concatenate.default}


def value_of(node: fx.Node) -> Any:
    """Return the fake value that tracing recorded for `node`."""
    return node.meta.get("val")


def values_of(node: fx.Node) -> tuple[Any, ...]:
    """Return the fake values of all results of `node`."""
    value = value_of(node)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def is_tensor(argument: object) -> bool:
    """Tell whether an argument is a node that computes a tensor."""
    return isinstance(argument, fx.Node) and isinstance(value_of(argument), torch.Tensor)


def is_view(target: object) -> bool:
    """Tell whether an operator returns the memory of an operand."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target is torch.ops.aten._unsafe_view.default:
        return True
    return any(value.alias_info is not None for value in target._schema.returns)


def size_hint(size: Any) -> int:
    """Return a size as a number; a symbolic one as the value it was traced with.

    One that depends on values has none: torch says so of `int`, and `capture.faults` with the user's line.
    """
    hint = size.node.hint if isinstance(size, torch.SymInt) else None
    return int(size if hint is None else hint)


def size_estimate(size: Any) -> int:
    """Return a size as a number where only costs depend on it; one that values decide (how many images there are) counts as 1."""
    is_known = not isinstance(size, torch.SymInt) or size.node.hint is not None
    return size_hint(size) if is_known else 1


def expression(size: Any) -> sympy.Expr:
    """Return a size as an expression; symbolic sizes keep their symbol."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


@dataclass(frozen=True, slots=True)
class Call:
    """An operator node with its arguments by schema name, defaults included."""

    node: fx.Node
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> Call:
        """Bind the arguments of `node`, a call of an `OpOverload`."""
        assert isinstance(node.target, torch._ops.OpOverload), node.format_node()
        schema = node.target._schema.arguments
        bound: dict[str, Any] = {a.name: a.default_value for a in schema if a.has_default_value()}
        bound.update(zip((a.name for a in schema), node.args, strict=False))
        bound.update(node.kwargs)
        return cls(node, {a.name: bound.get(a.name) for a in schema})

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arguments

    @property
    def target(self) -> torch._ops.OpOverload:
        """The operator that is called."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        return self.node.target

    @property
    def result(self) -> Any:
        """The fake value of the result: a tensor, or a tuple of them."""
        return value_of(self.node)

    @property
    def is_tuple(self) -> bool:
        """Whether the operator has several results."""
        return isinstance(self.result, tuple | list)

    @property
    def results(self) -> tuple[Any, ...]:
        """The fake values of all results."""
        return values_of(self.node)

    def operands(self) -> Iterator[tuple[str, fx.Node]]:
        """Yield the tensor operands as (name, node); the members of a list are named `tensors.0`, `tensors.1`, ..."""
        for name, argument in self.arguments.items():
            if is_tensor(argument):
                yield name, argument
            elif isinstance(argument, list | tuple):
                for i, member in enumerate(argument):
                    if is_tensor(member):
                        yield f"{name}.{i}", member

    def tensor(self, name: str) -> torch.Tensor:
        """Return the fake value of the operand `name`."""
        value = value_of(dict(self.operands())[name])
        assert isinstance(value, torch.Tensor)
        return value

    def shape(self, name: str) -> tuple[Any, ...]:
        """Return the shape of the operand `name`; sizes may be symbolic."""
        return tuple(self.tensor(name).shape)

    def dim(self, name: str, operand: str) -> int:
        """Return the argument `name`, a dim of `operand`, counted from the front."""
        rank = max(self.tensor(operand).dim(), 1)
        return int(self[name]) % rank

    def rebound(self, changes: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with the named arguments or list members changed; defaults at the end are left out."""
        bound = dict(self.arguments)
        for name, value in changes.items():
            outer, _, index = name.partition(".")
            if index:
                members = list(bound[outer])
                members[int(index)] = value
                bound[outer] = members
            else:
                bound[outer] = value
        schema = self.target._schema.arguments
        args = [bound[a.name] for a in schema if not a.kwarg_only]
        while args and _is_default(args[-1], schema[len(args) - 1]):
            args.pop()
        kwargs = {a.name: bound[a.name] for a in schema if a.kwarg_only and not _is_default(bound[a.name], a)}
        return tuple(args), kwargs


def _is_default(value: Any, argument: torch.Argument) -> bool:
    return bool(
        argument.has_default_value() and type(value) is type(argument.default_value) and value == argument.default_value
    )


def depends_on_length(node: fx.Node) -> bool:
    """Tell whether a size of a call is a quotient of lengths, which some lengths divide."""
    values = [value for each in (node, *node.all_input_nodes) for value in values_of(each)]
    sizes = [expression(size) for value in values if isinstance(value, torch.Tensor) for size in value.shape]
    return any(not size.is_polynomial(*size.free_symbols) for size in sizes)
