"""Attention as one operator: `scaled_dot_product_attention(q, k, v, mask)`."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.analysis.patterns.attention import Attention, can_drop, is_batched
from cpcompile.analysis.patterns.nodes import converted, may_need_gradient
from cpcompile.ir.operator_call import Call, value_of

aten = torch.ops.aten


def read_fused(node: fx.Node) -> Attention | None:
    """Read `scaled_dot_product_attention`."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    call = Call.of(node)
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    scale = call["scale"] if call["scale"] is not None else default_scale(call)
    if scale is None:
        return None
    q, k, v = (converted(node, operand, value_of(node).dtype) for operand in (q, k, v))
    return Attention(
        (node,), q, k, v, mask, float(scale), is_causal=call["is_causal"], dropout=float(call["dropout_p"])
    )


def is_one_operator(found: Attention, exact_dropout: bool) -> bool:
    """Tell whether `cpcompile.attention` can say a fused attention: it has no gradient for its mask."""
    has_gradient = found.mask is not None and may_need_gradient(found.mask)
    q, k, v = (value_of(x).shape for x in (found.q, found.k, found.v))
    return is_batched(q, k, v) and not has_gradient and can_drop(q[-2], k[-2], found.dropout, exact_dropout)


def default_scale(call: Call) -> float | None:
    """Return `head_dim ** -0.5`, or None when the head dim is symbolic."""
    size = call.shape("query")[-1]
    return float(size**-0.5) if isinstance(size, int) else None
