"""Views by factors: where the tokens land when a tensor of the same elements gets another shape.

In row-major order the tokens are one factor of the element number: `outer * tokens * inner`. A view keeps
element numbers, so the tokens stay sharded exactly when some dim of the new shape holds that whole factor.
Sizes never decide: a 64 that is no token count stays one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from cpcompile.ir.operator_call import Call, expression
from cpcompile.ir.placement import Sharded
from cpcompile.rules.registry import Decision, Local, Lowering, no_rule, register

aten = torch.ops.aten


def quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
    """Return a / b where b divides a for every value of the symbols, else None."""
    result = sympy.cancel(a / b)
    numerator, denominator = sympy.fraction(result)
    if denominator != 1 or (numerator.is_number and not numerator.is_integer):
        return None
    return result


def locate_tokens(shape: tuple[Any, ...], target: tuple[Any, ...], at: Sharded, length: Any) -> Sharded | None:
    """Return where the tokens of `shape`, sharded `at`, are in the view `target`, or None when no dim holds them whole."""
    tokens = expression(at.count(length))
    stride = sympy.Integer(at.inner)
    for size in shape[at.dim + 1 :]:
        stride *= expression(size)
    after = sympy.Integer(1)
    for dim in reversed(range(len(target))):
        size = expression(target[dim])
        if tokens == size == 1 and after == stride:
            return replace(at, dim=dim, inner=1)  # of a sequence of one token: a dim of its own says more than a factor
        if quotient(stride, after * size) is not None:
            after *= size
            continue
        inner = quotient(stride, after)
        if inner is None or not inner.is_Integer or quotient(size, tokens * inner) is None:
            return None
        return replace(at, dim=dim, inner=int(inner))
    return None


@dataclass(frozen=True, slots=True)
class ViewRule:
    """A reshape; `sizes` names the argument with the new shape, or a part of it, if the operator has one."""

    sizes: str | None
    notation: str = "[a (b c)] -> [(a b) c], as long as one dim holds the tokens whole"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        at = operands["self"]
        result = locate_tokens(call.shape("self"), tuple(call.result.shape), at, length)
        if result is None:
            moved = f"{list(call.shape('self'))} -> {list(call.result.shape)} moves tokens between ranks"
            raise no_rule(call, operands, f"cannot keep its operand sharded: {moved}", self.notation)
        return self._decision(call, at, result)

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        at = locate_tokens(tuple(call.result.shape), call.shape("self"), result, length)
        return None if at is None else self._decision(call, at, result)

    def _decision(self, call: Call, at: Sharded, result: Sharded) -> Decision:
        if self.sizes is None:
            return Decision({"self": at}, (result,))
        sizes = list(call[self.sizes])
        first = call.dim("dim", "self") if "dim" in call else 0  # unflatten spells only the sizes of one dim
        if 0 <= result.dim - first < len(sizes) and sizes[result.dim - first] != -1:
            sizes[result.dim - first] = Local(sizes[result.dim - first], result)
        return Decision({"self": at}, (result,), {self.sizes: sizes})


@dataclass(frozen=True, slots=True)
class ViewAsRule:
    """A reshape to the shape of another operand, which then has the placement of the result."""

    notation: str = "[a (b c)], [(a b) c] -> [(a b) c], as long as one dim holds the tokens whole"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        shape, other = call.shape("self"), call.shape("other")
        at = operands.get("self") or locate_tokens(other, shape, operands["other"], length)
        result = None if at is None else locate_tokens(shape, other, at, length)
        if at is None or result is None:
            raise no_rule(call, operands, f"{list(shape)} -> {list(other)} moves tokens between ranks", self.notation)
        return Decision({"self": at, "other": result}, (result,))

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        at = locate_tokens(call.shape("other"), call.shape("self"), result, length)
        return None if at is None else Decision({"self": at, "other": result}, (result,))


register(ViewAsRule(), aten.view_as.default, aten.reshape_as.default)
register(ViewRule("size"), aten.view.default, aten._unsafe_view.default)
register(ViewRule("shape"), aten.reshape.default)
register(ViewRule("sizes"), aten.unflatten.int)
register(ViewRule(None), aten.flatten.using_ints, aten.unsqueeze.default)


@dataclass(frozen=True, slots=True)
class SqueezeRule(ViewRule):
    """A squeeze drops the dims that have one entry in the whole tensor: a rank that holds one token keeps its dim."""

    notation: str = "[a 1 b] -> [a b]"

    def _decision(self, call: Call, at: Sharded, result: Sharded) -> Decision:
        shape = call.shape("self")
        asked = call["dim"] if "dim" in call else range(len(shape))
        dims = [dim % len(shape) for dim in ([asked] if isinstance(asked, int) else asked)]
        if at.dim not in dims:
            return Decision({"self": at}, (result,))
        single = [dim for dim in dims if isinstance(shape[dim], int) and shape[dim] == 1]
        if at.dim in single:
            raise no_rule(call, {"self": at}, "the dim of the tokens is dropped", self.notation)

        def lower(writer: Lowering) -> Sequence[fx.Node]:
            return [writer.insert(aten.squeeze.dims, writer.call["self"], single)]

        return Decision({"self": at}, (result,), lower=lower)


register(SqueezeRule(None), aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
