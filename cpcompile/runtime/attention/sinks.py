"""Sinks: a logit per head that takes part in the softmax of each row and has no value (Xiao et al., 2023; gpt-oss).

It scales a row's result and moves its logsumexp, whatever kernel and strategy computed them. With both given to it, a
kernel's backward is that of the attention with sinks.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (out, lse) `[B, H, S, D]`, `[B, H, S]` of attention with `sinks` `[H]`, given those without; overwrites `out`."""
    if sinks is None:
        return out, lse
    logits = sinks.to(lse.dtype)[None, :, None]
    total = torch.logaddexp(lse, logits)
    out.copy_(out.to(lse.dtype) * torch.exp(lse - total).unsqueeze(-1))
    return out, total


def sinks_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor | None:
    """Return the gradient of the sinks over these rows, for `out` and `lse` with sinks."""
    if sinks is None:
        return None
    weight = torch.exp(sinks.to(lse.dtype)[None, :, None] - lse)
    return -(weight * (dout.to(lse.dtype) * out).sum(-1)).sum((0, 2)).to(sinks.dtype)
