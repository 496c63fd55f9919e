"""Pointwise operators: each element of the result comes from the elements at its place, after broadcasting."""

from __future__ import annotations

from typing import Any

import torch

from cpcompile import runtime  # noqa: F401  (registers the operator)
from cpcompile.ir.operator_call import Call
from cpcompile.rules.registry import RULES, Indices, Names, rule

aten = torch.ops.aten

# Pointwise in effect, though torch does not tag them so: conversions, copies, and operators that draw or fill
# by element.
UNTAGGED = (
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Scalar,
    aten.__or__.Tensor,
    aten.__xor__.Tensor,
    aten.divide.Scalar,
    aten.divide.Tensor,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.imag.default,
    aten.log_sigmoid.default,
    aten.multiply.Scalar,
    aten.multiply.Tensor,
    aten.polar.default,
    aten.real.default,
    aten.subtract.Tensor,
    aten.true_divide.Tensor,
    aten.alias.default,
    aten.clone.default,
    aten.conj.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
    aten.empty_like.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.float_power.Tensor_Scalar,
    aten.full_like.default,
    aten.hardswish.default,
    aten.lift_fresh_copy.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.native_dropout.default,
    aten.ones_like.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.bernoulli.p,
    aten.normal_functional.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.uniform.default,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.where.Scalar,
    aten.where.self,
    aten.zeros_like.default,
)


def is_one(size: Any) -> bool:
    """Tell whether a size is 1; a symbolic size never is (torch gives sizes of 0 and 1 no symbol)."""
    return isinstance(size, int) and size == 1


def aligned(shape: tuple[Any, ...], result: tuple[Any, ...]) -> Names:
    """Return the names of an operand's dims under broadcasting to `result`, whose dim i is called `d{i}`."""
    shift = len(result) - len(shape)
    return tuple(
        None if is_one(size) and not is_one(result[i + shift]) else f"d{i + shift}" for i, size in enumerate(shape)
    )


def pointwise(call: Call) -> Indices:
    """[...], [...] -> [...] with broadcasting"""
    shape = tuple(call.results[0].shape)
    operands = {name: aligned(call.shape(name), shape) for name, _ in call.operands()}
    results = (tuple(f"d{i}" for i in range(len(shape))),) * len(call.results)
    return Indices(operands, results, gathers=tuple(operands))


rule(*UNTAGGED, torch.ops.cpcompile.show.default)(pointwise)


@rule(aten.type_as.default)
def type_as(call: Call) -> Indices:
    """[...], _ -> [...]"""
    names = tuple(f"d{i}" for i in range(len(call.shape("self"))))
    return Indices({"self": names}, (names,))


@rule(aten.prelu.default)
def prelu(call: Call) -> Indices:
    """[a b ...], [b] or [1] -> [a b ...]"""
    names: Names = tuple(f"d{i}" for i in range(len(call.shape("self"))))
    slopes = call.shape("weight")
    of_channels = names[1:2] if slopes and not is_one(slopes[0]) else (None,) * len(slopes)
    return Indices({"self": names, "weight": of_channels}, (names,))


@rule(aten.cosine_similarity.default)
def cosine_similarity(call: Call) -> Indices:
    """[... d], [... d] -> [...] with broadcasting"""
    first, second = call.shape("x1"), call.shape("x2")
    rank = max(len(first), len(second))
    first, second = ((1,) * (rank - len(shape)) + shape for shape in (first, second))
    shape = tuple(b if is_one(a) else a for a, b in zip(first, second, strict=True))
    mixed = int(call["dim"]) % rank
    names: Names = tuple(f"d{i}" for i in range(rank) if i != mixed)
    operands = {
        name: tuple(None if d == f"d{mixed}" else d for d in aligned(call.shape(name), shape)) for name in ("x1", "x2")
    }
    return Indices(operands, (names,))


@rule(aten.feature_dropout.default)
def feature_dropout(call: Call) -> Indices:
    """[a b ...] -> [a b ...'], mixing all but the first two dims: a feature is dropped whole or kept"""
    names = tuple(f"d{i}" if i < 2 else None for i in range(len(call.shape("input"))))
    return Indices({"input": names}, (names,))


# Tagged as pointwise, but the result is one truth value for all elements.
NOT_POINTWISE = (aten.equal.default,)


def _register_tagged() -> None:
    """Enter the rule for every operator tagged as pointwise that writes to none of its operands."""
    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, qualified = name.partition("::")
        packet, _, overload = qualified.partition(".")
        if namespace != "aten" or not hasattr(aten, packet):
            continue
        target = getattr(getattr(aten, packet), overload or "default", None)
        if target is None or torch.Tag.pointwise not in target.tags or target in RULES or target in NOT_POINTWISE:
            continue
        if not target._schema.is_mutable:
            rule(target)(pointwise)


_register_tagged()
