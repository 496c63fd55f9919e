"""Zero keys: a key and a value of zeros behind the others, which every query sees, are a sink whose logit is 0.

before  k = aten.cat([k, aten.zeros([B, 1, D])], 1); v likewise; mask = aten.pad(mask, [0, 1])
after   the attention of k, v and mask, with sinks of 0

So does `add_zero_attn` of `torch.nn.MultiheadAttention` write it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from cpcompile.analysis.masks.expression import TRUE
from cpcompile.analysis.masks.read import Reader, constant
from cpcompile.analysis.masks.read import size_of as expression_of_size
from cpcompile.analysis.masks.recognise import predicate
from cpcompile.analysis.masks.simplify import substitute
from cpcompile.analysis.patterns.attention import Attention
from cpcompile.analysis.patterns.formula import size_of
from cpcompile.ir.insertion import insert_call
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten

_VIEWS = {aten.view.default, aten.reshape.default}


def with_sink_for_zeros(found: Attention, reader: Reader) -> Attention:
    """Return the attention without a key and a value of zeros behind the others, and a sink in their place."""
    if found.sinks is not None or found.is_causal or found.dropout:
        return found
    end = found.nodes[-1]
    if found.mask is not None and not shows_last_key(found.mask, reader):
        return found
    k, v = (without_zeros(end, operand, reader) for operand in (found.k, found.v))
    if k is None or v is None:
        return found
    mask = found.mask
    if mask is not None and not statically_known_true(value_of(mask).shape[-1] == 1):
        mask = insert_call(end, aten.slice.Tensor, mask, -1, 0, size_of(end, k, -2))
    heads = value_of(found.q).shape[1] if value_of(found.q).dim() == 4 else 1
    return replace(found, k=k, v=v, mask=mask, sinks=insert_call(end, aten.new_zeros.default, found.q, [heads]))


def without_zeros(before: fx.Node, operand: fx.Node, reader: Reader) -> fx.Node | None:
    """Return keys or values without the row of zeros that was joined behind them, or None if there is none."""
    shape = value_of(operand).shape
    if operand.target in _VIEWS:
        inner = operand.args[0]
        assert isinstance(inner, fx.Node)
        is_of_rows = all(
            statically_known_true(a == b) for a, b in zip(value_of(inner).shape[-2:], shape[-2:], strict=True)
        )
        rows = without_zeros(before, inner, reader) if is_of_rows and value_of(inner).dim() >= 2 else None
        if rows is None:
            return None
        sizes = [size_of(before, operand, dim) for dim in range(len(shape) - 2)]
        return insert_call(before, aten.reshape.default, rows, [*sizes, *(size_of(before, rows, d) for d in (-2, -1))])
    if operand.target is not aten.cat.default or Call.of(operand)["dim"] not in (-2, len(shape) - 2):
        return None
    *rows, zeros = Call.of(operand)["tensors"]
    is_row = statically_known_true(value_of(zeros).shape[-2] == 1) and constant(reader, zeros) == 0
    return rows[0] if is_row and len(rows) == 1 else None


def shows_last_key(mask: fx.Node, reader: Reader) -> bool:
    """Tell whether every query sees the last key, and nothing is added to its score."""
    value, tensor = reader.read(mask), value_of(mask)
    if value is None:
        return False
    key = tensor.dim() - 1
    last = substitute(value, {key: expression_of_size(tensor.shape[key] - 1)})
    seen = predicate(last, tensor.dtype)
    return seen is not None and seen[0] == TRUE
