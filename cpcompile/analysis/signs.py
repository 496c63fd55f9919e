"""Signs: which values are above 0, at least 0 or at most 0, whatever finite numbers they are computed from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call

aten = torch.ops.aten

# Their elements are some of the first operand's, or sums and means of these: what holds for all of them holds for the result.
_OF_ELEMENTS = {
    aten.alias.default,
    aten.amax.default,
    aten.amin.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.broadcast_to.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.mean.dim,
    aten.permute.default,
    aten.reshape.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.sum.dim_IntList,
    aten.to.dtype,
    aten._to_copy.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.view.default,
    aten.view_as.default,
}
# At least 0, and 0 at some numbers, or where they round to it.
_AT_LEAST_ZERO = {
    aten._softmax.default,
    aten.abs.default,
    aten.exp.default,
    aten.linalg_vector_norm.default,
    aten.norm.ScalarOpt_dim,
    aten.relu.default,
    aten.sigmoid.default,
    aten.softmax.int,
    aten.softplus.default,
    aten.square.default,
    aten.std.correction,
    aten.var.correction,
}
_PRODUCTS = {aten.mul.Tensor, aten.multiply.Tensor}
_SUMS = {aten.add.Tensor, aten.add.Scalar}
_NEGATIONS = {aten.neg.default, aten.negative.default}
_LIMITS = {aten.clamp.default, aten.clamp_min.default, aten.clip.default}
_DEPTH = 16  # operators that are looked through


def is_positive(x: Any, depth: int = _DEPTH) -> bool:
    """Tell whether every element is above 0."""
    if not isinstance(x, fx.Node):
        return isinstance(x, int | float) and x > 0
    call = _call(x, depth)
    if call is None:
        return False
    first, second = _operands(call)
    if call.target in _SUMS:
        one_is = is_positive(first, depth - 1) or is_positive(second, depth - 1)
        return one_is and _adds(call) and all(is_at_least_zero(each, depth - 1) for each in (first, second))
    if call.target in _LIMITS:
        return is_positive(call["min"]) and (call.arguments.get("max") is None or is_positive(call["max"]))
    if call.target in (aten.sqrt.default, aten.rsqrt.default, *_OF_ELEMENTS):
        return is_positive(first, depth - 1)
    return False


def is_at_least_zero(x: Any, depth: int = _DEPTH) -> bool:
    """Tell whether no element is below 0."""
    if not isinstance(x, fx.Node):
        return isinstance(x, int | float) and x >= 0
    call = _call(x, depth)
    if call is None:
        return False
    first, second = _operands(call)
    if call.target in _AT_LEAST_ZERO:
        return True
    if call.target is aten.pow.Tensor_Scalar:
        return bool(call["exponent"] % 2 == 0)
    if call.target in _PRODUCTS and first is second:
        return True
    if call.target in (*_PRODUCTS, *_SUMS):
        is_known = call.target in _PRODUCTS or _adds(call)
        return is_known and all(is_at_least_zero(each, depth - 1) for each in (first, second))
    if call.target in (aten.sqrt.default, *_OF_ELEMENTS):
        return is_at_least_zero(first, depth - 1)
    return is_positive(x, depth)


def is_at_most_zero(x: Any, depth: int = _DEPTH) -> bool:
    """Tell whether no element is above 0."""
    if not isinstance(x, fx.Node):
        return isinstance(x, int | float) and x <= 0
    call = _call(x, depth)
    if call is None:
        return False
    first, second = _operands(call)
    if call.target is aten.log_sigmoid.default:
        return True
    if call.target in _NEGATIONS:
        return is_at_least_zero(first, depth - 1)
    if call.target in _PRODUCTS:
        pairs = ((first, second), (second, first))
        return any(is_at_least_zero(a, depth - 1) and is_at_most_zero(b, depth - 1) for a, b in pairs)
    if call.target in _SUMS:
        return _adds(call) and all(is_at_most_zero(each, depth - 1) for each in (first, second))
    return call.target in _OF_ELEMENTS and is_at_most_zero(first, depth - 1)


def _call(node: fx.Node, depth: int) -> Call | None:
    return Call.of(node) if depth > 0 and isinstance(node.target, torch._ops.OpOverload) else None


def _operands(call: Call) -> tuple[Any, Any]:
    arguments: Mapping[str, Any] = call.arguments
    return (*arguments.values(), None, None)[0], arguments.get("other")


def _adds(call: Call) -> bool:
    """Tell whether a sum counts its second operand with a factor that is not below 0."""
    return isinstance(call["alpha"], int | float) and call["alpha"] >= 0
