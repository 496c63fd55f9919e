"""Operators that are not finite everywhere: for some numbers their value or their gradient is infinite, NaN, or an error.

Slots that hold no token hold numbers that no token has: zeros behind a shift, an attention, a fill. Their gradient is 0, but 0
times infinity is NaN, which a product with a parameter spreads to all of its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from cpcompile.ir.operator_call import Call, value_of
from cpcompile.rules.ranges import constant_value

aten = torch.ops.aten
Target = torch._ops.OpOverload


@dataclass(frozen=True, slots=True)
class Harmless:
    """A number for which an operator and its gradient are finite.

    Attributes:
        number: it.
        sign: 1 where so they are for all numbers above 0, -1 where for all up to 0, 0 where for neither.
    """

    number: float
    sign: int = 0


# Not finite at 0, or below: finite at 1, and so is the gradient.
_AT_ONE: dict[str, tuple[Target, ...]] = {
    "self": (
        aten.digamma.default,
        aten.float_power.Tensor_Scalar,
        aten.float_power.Tensor_Tensor,
        aten.hypot.default,
        aten.lgamma.default,
        aten.log.default,
        aten.log10.default,
        aten.log1p.default,
        aten.log2.default,
        aten.polygamma.default,
        aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor,
        aten.reciprocal.default,
        aten.rsqrt.default,
        aten.special_bessel_y0.default,
        aten.special_bessel_y1.default,
        aten.special_entr.default,
        aten.special_erfcx.default,
        aten.special_modified_bessel_k0.default,
        aten.special_modified_bessel_k1.default,
        aten.sqrt.default,
        # The matrix of ones can be solved, that of zeros cannot.
        aten.linalg_solve_triangular.default,
    ),
    "other": (
        aten.div.Tensor,
        aten.div.Tensor_mode,
        aten.divide.Tensor,
        aten.floor_divide.default,
        aten.fmod.Tensor,
        aten.remainder.Scalar_Tensor,
        aten.remainder.Tensor,
        aten.special_xlog1py.default,
        aten.special_xlog1py.self_scalar,
        aten.true_divide.Tensor,
        aten.xlogy.Scalar_Self,
        aten.xlogy.Tensor,
    ),
    "x": (aten.special_scaled_modified_bessel_k0.default, aten.special_scaled_modified_bessel_k1.default),
    "tensor2": (aten.addcdiv.default,),
    # Without an epsilon; of a row of ones the root of the mean square is 1.
    "input": (aten.rms_norm.default,),
}
# Finite between two numbers only.
_INSIDE = (
    aten.acos.default,
    aten.asin.default,
    aten.atanh.default,
    aten.erfinv.default,
    aten.logit.default,
    aten.special_ndtri.default,
)
# Not finite up to 1, or up to half of a number of dims.
_ABOVE = {
    aten.acosh.default: "self",
    aten.mvlgamma.default: "self",
    aten.special_zeta.other_scalar: "self",
    aten.special_zeta.self_scalar: "other",
}
# Overflow, where no token's number does.
_EXPONENTIALS = (aten.exp.default, aten.exp2.default, aten.expm1.default)
_AT_ZERO: dict[str, tuple[Target, ...]] = {
    "self": (aten.cosh.default, aten.sinh.default),
    "exponent": (aten.pow.Scalar, aten.float_power.Scalar),
}
# Indices, which must exist.
_INDICES: dict[str, tuple[Target, ...]] = {
    "self": (aten.one_hot.default,),
    "index": (
        aten.gather.default,
        aten.index_select.default,
        aten.scatter.src,
        aten.scatter.value,
        aten.scatter_add.default,
        aten.scatter_reduce.two,
    ),
    "indices": (aten.embedding.default, aten.index.Tensor),
}

FINITE_AT: Mapping[Target, Mapping[str, Harmless]] = {
    **{target: {name: Harmless(1.0, sign=1)} for name, targets in _AT_ONE.items() for target in targets},
    **{target: {"self": Harmless(0.5)} for target in _INSIDE},
    **{target: {name: Harmless(100.0)} for target, name in _ABOVE.items()},
    aten.special_zeta.default: {"self": Harmless(100.0), "other": Harmless(100.0)},
    **{target: {"self": Harmless(0.0, sign=-1)} for target in _EXPONENTIALS},
    **{t: {name: Harmless(0.0)} for of in (_AT_ZERO, _INDICES) for name, targets in of.items() for t in targets},
}
INDEXED = frozenset(target for targets in _INDICES.values() for target in targets)
_POWERS = {aten.pow.Tensor_Scalar, aten.float_power.Tensor_Scalar}
# What is put in the place of elements, by the mask of that name, and which truth value of it does so.
_FILLS: Mapping[Target, tuple[tuple[str, str, bool], ...]] = {
    aten.masked_fill.Scalar: (("value", "mask", True),),
    aten.masked_fill.Tensor: (("value", "mask", True),),
    aten.where.ScalarOther: (("other", "condition", False),),
    aten.where.ScalarSelf: (("self", "condition", True),),
    aten.where.self: (("other", "condition", False), ("self", "condition", True)),
}


def finite_at(call: Call) -> dict[str, Harmless]:
    """Return the tensor operands that must not hold every number, each with one for which all is finite."""
    if call.target in _POWERS and float(call["exponent"]) in range(64):  # whole powers are finite everywhere
        return {}
    if call.target is aten.rms_norm.default and call["eps"] != 0:
        return {}
    for filler, mask, fills_if in _FILLS.get(call.target, ()):
        if _is_infinite(call[filler]):  # no mask hides all scores of a softmax where that of no token does
            return {mask: Harmless(float(not fills_if))}
    known = FINITE_AT.get(call.target, {})
    return {
        name: known[of]
        for name, operand in call.operands()
        # A mask is no index that may not exist, and what it picks is put back by the same mask.
        if (of := name.partition(".")[0]) in known and value_of(operand).dtype != torch.bool
    }


def _is_infinite(filler: object) -> bool:
    number = constant_value(filler) if isinstance(filler, fx.Node) else filler
    return isinstance(number, int | float) and not math.isfinite(number)
