"""Expansions: operators that are sums and products in one call, written as these.

lerp(a, b, w)   is   a + w * (b - a)        linear(x, w, b)   is   x @ w^T + b        add(a, b, alpha=2)   is   a + 2 * b
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from cpcompile.analysis.patterns.nodes import converted
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


def expanded(call: Call) -> fx.Node | None:
    """Return what a call computes, by sums and products before it; None if it is no such call, or one of these itself."""
    expansion = EXPANSIONS.get(call.target)
    return None if expansion is None else expansion(call)


def product(call: Call, x: Any, factor: Any) -> Any:
    """Return the product of a node or a number with another."""
    if isinstance(factor, int | float) and factor == 1:
        return x
    if isinstance(x, fx.Node) or isinstance(factor, fx.Node):
        x, factor = (x, factor) if isinstance(x, fx.Node) else (factor, x)
        return insert_call(call.node, aten.mul.Tensor, x, factor)
    return x * factor


def total(call: Call, x: Any, y: Any) -> fx.Node:
    """Return the sum of a node and another, or a number."""
    terms = (x, y) if isinstance(x, fx.Node) else (y, x)
    return insert_call(call.node, aten.add.Tensor, *terms)


def columns(call: Call, name: str) -> fx.Node:
    """Return a vector as a matrix of one column."""
    return insert_call(call.node, aten.unsqueeze.default, call[name], -1)


def add(call: Call) -> fx.Node | None:
    """Return `self + alpha * other`; None if alpha is 1."""
    return None if call["alpha"] == 1 else total(call, call["self"], product(call, call["other"], call["alpha"]))


def sub(call: Call) -> fx.Node:
    """Return `self + -alpha * other`."""
    return total(call, call["self"], product(call, call["other"], -call["alpha"]))


def rsub(call: Call) -> fx.Node:
    """Return `other + -alpha * self`."""
    return total(call, product(call, call["self"], -call["alpha"]), call["other"])


def neg(call: Call) -> fx.Node:
    """Return `-1 * self`."""
    return insert_call(call.node, aten.mul.Tensor, call["self"], -1)


def quotient(call: Call, x: fx.Node, divisor: Any) -> fx.Node | None:
    """Return `x * (1 / divisor)`; None if that number is none that the dtype has, as where the divisor is 0."""
    if not isinstance(divisor, fx.Node):
        is_known = divisor != 0 and abs(1 / divisor) <= torch.finfo(call.result.dtype).max
        return insert_call(call.node, aten.mul.Tensor, x, 1 / divisor) if is_known else None
    divisor = converted(call.node, divisor, call.result.dtype)
    return insert_call(call.node, aten.mul.Tensor, x, insert_call(call.node, aten.reciprocal.default, divisor))


def addcdiv(call: Call) -> fx.Node:
    """Return `self + value * tensor1 / tensor2`."""
    ratio = quotient(call, product(call, call["tensor1"], call["value"]), call["tensor2"])
    assert ratio is not None, "this divides by a tensor"
    return total(call, call["self"], ratio)


def addcmul(call: Call) -> fx.Node:
    """Return `self + value * tensor1 * tensor2`."""
    return total(call, call["self"], product(call, product(call, call["tensor1"], call["value"]), call["tensor2"]))


def lerp(call: Call) -> fx.Node:
    """Return `self + weight * (end - self)`."""
    change = total(call, call["end"], insert_call(call.node, aten.mul.Tensor, call["self"], -1))
    return total(call, call["self"], product(call, change, call["weight"]))


def linear(call: Call) -> fx.Node | None:
    """Return `input @ weight^T + bias`."""
    if len(call.shape("weight")) != 2:
        return None
    weight = insert_call(call.node, aten.transpose.int, call["weight"], 0, 1)
    found = insert_call(call.node, aten.matmul.default, call["input"], weight)
    return found if call["bias"] is None else total(call, found, call["bias"])


def matmul(call: Call) -> fx.Node | None:
    """Return a product with a vector as one with a matrix of one row or column; None if there is no vector."""
    first, second = (name for name, _ in call.operands())
    a, b = call[first], call[second]
    if len(call.shape(second)) == 1:
        found = insert_call(call.node, aten.matmul.default, a, columns(call, second))
        return insert_call(call.node, aten.squeeze.dim, found, -1)
    if len(call.shape(first)) == 1:
        found = insert_call(call.node, aten.matmul.default, insert_call(call.node, aten.unsqueeze.default, a, 0), b)
        return insert_call(call.node, aten.squeeze.dim, found, -2)
    return None if call.target is aten.matmul.default else insert_call(call.node, aten.matmul.default, a, b)


def addr(call: Call) -> fx.Node:
    """Return `beta * self + alpha * vec1 * vec2`, of a column and a row; with beta = 0, `self` is not read."""
    found: fx.Node = product(call, product(call, columns(call, "vec1"), call["vec2"]), call["alpha"])
    return found if call["beta"] == 0 else total(call, found, product(call, call["self"], call["beta"]))


def masked_fill(call: Call) -> fx.Node | None:
    """Return `value` where the mask is, plus `self` filled with 0 there; None if that is 0 or not finite."""
    if call["value"] == 0 or not is_finite(call["value"]):
        return None
    return total(call, kept(call, call["value"], call["mask"]), without(call, call["self"], call["mask"]))


def where(call: Call) -> fx.Node | None:
    """Return the sum of both values, each filled with 0 where the other counts; None if one is a number that is not finite."""
    if not (is_finite(call["self"]) and is_finite(call["other"])):
        return None
    return total(call, kept(call, call["self"], call["condition"]), without(call, call["other"], call["condition"]))


def is_finite(x: Any) -> bool:
    """Tell whether 0 times a number is 0; of a node, which is filled with 0 instead, nothing is asked."""
    return not isinstance(x, int | float) or math.isfinite(x)


def kept(call: Call, x: Any, mask: fx.Node) -> fx.Node:
    """Return a value, or a number, where a mask is, and 0 elsewhere."""
    return without(call, x, insert_call(call.node, aten.logical_not.default, mask))


def without(call: Call, x: Any, mask: fx.Node) -> fx.Node:
    """Return 0 where a mask is, and a value, or a number, elsewhere."""
    if isinstance(x, fx.Node):
        return insert_call(call.node, aten.masked_fill.Scalar, x, mask, 0)
    is_kept = insert_call(call.node, aten.logical_not.default, mask)
    return insert_call(call.node, aten.mul.Tensor, converted(call.node, is_kept, call.result.dtype), x)


def added_product(target: Any, first: str, second: str) -> Callable[[Call], fx.Node]:
    """Return the expansion of an operator that is `beta * self + alpha * first @ second`; with beta = 0, `self` is not read."""

    def expansion(call: Call) -> fx.Node:
        dtype = value_of(call.node).dtype
        factors = (converted(call.node, call[name], dtype) for name in (first, second))
        found: fx.Node = product(call, insert_call(call.node, target, *factors), call["alpha"])
        if call["beta"] == 0:
            return found
        return total(call, found, product(call, converted(call.node, call["self"], dtype), call["beta"]))

    return expansion


EXPANSIONS: Mapping[Any, Callable[[Call], fx.Node | None]] = {
    aten.add.Tensor: add,
    aten.sub.Tensor: sub,
    aten.rsub.Scalar: rsub,
    aten.rsub.Tensor: rsub,
    aten.neg.default: neg,
    aten.div.Tensor: lambda call: quotient(call, call["self"], call["other"]),
    aten.addcmul.default: addcmul,
    aten.addcdiv.default: addcdiv,
    aten.lerp.Scalar: lerp,
    aten.lerp.Tensor: lerp,
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.mv.default: matmul,
    aten.addr.default: addr,
    aten.masked_fill.Scalar: masked_fill,
    aten.where.self: where,
    aten.where.ScalarSelf: where,
    aten.where.ScalarOther: where,
    aten.addmm.default: added_product(aten.mm.default, "mat1", "mat2"),
    aten.addmv.default: added_product(aten.mv.default, "mat", "vec"),
    aten.baddbmm.default: added_product(aten.bmm.default, "batch1", "batch2"),
}
