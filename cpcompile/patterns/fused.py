"""Attention as one operator: `scaled_dot_product_attention(q, k, v, mask)`."""

from __future__ import annotations

import torch
from torch import fx

from cpcompile.call import Call, value_of
from cpcompile.patterns.attention import Attention, is_batched, num_heads
from cpcompile.patterns.nodes import converted, may_need_gradient

aten = torch.ops.aten


def read_fused(node: fx.Node) -> Attention | None:
    """Read `scaled_dot_product_attention`."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    call = Call.of(node)
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    scale = call["scale"] if call["scale"] is not None else default_scale(call)
    if scale is None or not is_batched(*(value_of(x).shape for x in (q, k, v))):
        return None
    if value_of(q).dim() == 4 and num_heads(q) != num_heads(k) and not call["enable_gqa"]:
        return None
    if mask is not None and may_need_gradient(mask):
        return None
    q, k, v = (converted(node, operand, value_of(node).dtype) for operand in (q, k, v))
    return Attention(
        (node,), q, k, v, mask, float(scale), is_causal=call["is_causal"], dropout=float(call["dropout_p"])
    )


def default_scale(call: Call) -> float | None:
    """Return `head_dim ** -0.5`, or None when the head dim is symbolic."""
    size = call.shape("query")[-1]
    return float(size**-0.5) if isinstance(size, int) else None
