"""Triangles of a matrix whose rows or columns are tokens: what is kept depends on the positions of this rank's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.rules.along_tokens import along_tokens
from cpcompile.rules.over_tokens import counted, indices
from cpcompile.rules.registry import Decision, Indices, Lowering, rule

aten = torch.ops.aten


@rule(aten.tril.default, aten.triu.default)
def triangle(call: Call) -> Indices:
    """[... r c] -> [... r' c']"""
    rank = len(call.shape("self"))
    names = (*(f"d{i}" for i in range(rank - 2)), None, None)
    return Indices({"self": names}, (names,))


@along_tokens(aten.tril.default, aten.triu.default)
def along(call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision | None:
    """every rank keeps what is on its side of the diagonal, by the positions of its tokens"""
    at, rank = operands["self"], len(call.shape("self"))
    if at.reaches_outside:
        return None

    def lower(writer: Lowering) -> Sequence[fx.Node]:
        x = writer.call["self"]
        other = rank - 1 if at.dim == rank - 2 else rank - 2
        size = x.meta["val"].shape[other]
        size = size if isinstance(size, int) else writer.insert(aten.sym_size.int, x, other)
        places = {at.dim: indices(writer, at, x), other: counted(writer, x, size)}
        rows = writer.insert(aten.view.default, places[rank - 2], [-1, 1])
        columns = writer.insert(aten.view.default, places[rank - 1], [1, -1])
        last = writer.insert(aten.add.Tensor, rows, call["diagonal"])
        compare = aten.le.Tensor if call.target is aten.tril.default else aten.ge.Tensor
        return [writer.insert(aten.where.ScalarOther, writer.insert(compare, columns, last), x, 0)]

    return Decision({"self": at}, (at,), lower=lower)
