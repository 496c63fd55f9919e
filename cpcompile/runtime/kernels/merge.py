"""Merge: partial attention over disjoint keys becomes attention over all of them (Milakov and Gimelshein, 2018)."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which partial results of `dtype` are summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_(out: torch.Tensor, lse: torch.Tensor, block_out: torch.Tensor, block_lse: torch.Tensor) -> None:
    """Merge a block into `out` `[B, H, S, D]` and `lse` `[B, H, S]` in place. A row that saw no key has lse -inf and out 0."""
    block_lse = block_lse.to(lse.dtype)
    total = torch.logaddexp(lse, block_lse)
    # Where neither side saw a key, -inf - -inf would be NaN; against 0 both weights are exp(-inf) = 0.
    reference = total.masked_fill(total == -torch.inf, 0.0)
    kept, added = ((x - reference).exp_().unsqueeze(-1) for x in (lse, block_lse))
    out.copy_(out.to(total.dtype) * kept + block_out.to(total.dtype) * added)
    lse.copy_(total)


def add_(total: torch.Tensor, x: torch.Tensor) -> None:
    """Add `x` to `total` in place, rounded once: torch adds in float32 at least."""
    total.add_(x)
