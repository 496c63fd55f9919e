"""Partial sums: the operators under which a sum over ranks may stay to be done."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cpcompile.ir.operator_call import Call, is_tensor
from cpcompile.ir.placement import Full, Partial, Placement

aten = torch.ops.aten

# A partial sum may stay one under a linear operator; it is reduced before any other.
LINEAR = {
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.clone.default,
}
LINEAR_IN_FIRST = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
}  # the others must be Full or numbers


def stays_partial(call: Call, operands: Mapping[str, Placement]) -> bool:
    """Tell whether the call is linear in its partial operands, so that its result is a partial sum too."""
    partial = [name for name, p in operands.items() if isinstance(p, Partial)]
    if call.target in LINEAR:
        return True
    if call.target in LINEAR_IN_FIRST:
        return partial == ["self"] and all(isinstance(p, Full) for n, p in operands.items() if n != "self")
    if call.target in (aten.add.Tensor, aten.sub.Tensor):
        return len(partial) == 2
    floating = is_tensor(call.node) and call.result.is_floating_point() and call.tensor(partial[0]).is_floating_point()
    return call.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device) and floating
