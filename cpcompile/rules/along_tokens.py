"""What the rules for operators along the tokens share.

A rule for the other dims is extended by what happens along the tokens, which other operators compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from cpcompile.errors import NoRule
from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import FULL, PARTIAL, Placement, Sharded
from cpcompile.rules.registry import RULES, Decision, Lowering, Rule

aten, cp = torch.ops.aten, torch.ops.cpcompile

# What happens when `operands` are sharded along a dim that the operator runs over; None where that is not known.
Along = Callable[[Call, Mapping[str, Sharded], Any], Decision | None]


@dataclass(frozen=True, slots=True)
class ExtendedRule:
    """A rule, and what to do where it does not apply because the operator runs over the tokens."""

    base: Rule
    along: Along

    @property
    def notation(self) -> str:
        return f"{self.base.notation}; along the tokens: {(self.along.__doc__ or '').splitlines()[0]}"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        try:
            return self.base.push(call, operands, length)
        except NoRule:
            decision = self.along(call, operands, length)
            if decision is None:
                raise
            return decision

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return self.base.pull(call, result, length)


def along_tokens(*targets: torch._ops.OpOverload) -> Callable[[Along], Along]:
    """Extend the rules of `targets`; the docstring of the function says what happens along the tokens."""

    def decorate(along: Along) -> Along:
        for target in targets:
            RULES[target] = ExtendedRule(RULES[target], along)
        return along

    return decorate


def holds_tokens_only(call: Call, name: str, at: Sharded, length: Any) -> bool:
    """Tell whether the sharded dim of an operand has one element for each token."""
    return at.inner == 1 and expression(call.shape(name)[at.dim]) == expression(at.count(length))


def before_end(writer: Lowering, count: int) -> fx.Node | int:
    """Return the graph argument for the number of tokens less `count`."""
    if count == 0 or isinstance(writer.length, int):
        return writer.length - count if isinstance(writer.length, int) else writer.length
    return writer.insert(operator.sub, writer.length, count)


def moved(writer: Lowering, x: fx.Node, at: Sharded, offset: Any, *, sign: int = 1, wrap: bool = False) -> fx.Node:
    """Write the tokens of `x` in other slots: position p gets the token of `sign * p + offset`, or 0 where there is none."""
    places = (at.dim, 1, sign, offset, wrap, 0.0)
    return writer.insert(cp.move_tokens.default, x, *places, writer.length, *writer.axis)


def added_up(writer: Lowering, addend: fx.Node) -> fx.Node:
    """Return the whole value of which every rank has an addend: truth values are added as numbers."""
    if addend.meta["val"].dtype != torch.bool:
        return addend
    number = writer.insert(aten.to.dtype, addend, torch.uint8)
    _, world_size, group, *_ = writer.axis
    return writer.insert(aten.to.dtype, writer.insert(cp.all_reduce.default, number, world_size, group), torch.bool)


def addend_of(value: torch.Tensor) -> Placement:
    """Return the placement of what `added_up` returns for a value of this dtype."""
    return FULL if value.dtype == torch.bool else PARTIAL
