"""Llama3 bounds: the one call of a varlen kernel that computes the rows of a rank from one slice of gathered keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Llama3Bounds:
    """What the rows of one rank attend to, causally. Bottom-right aligned: a rank may hold the last rows of a document only.

    Attributes:
        cu_seqlens_q: boundaries of the documents within the rows of the rank, [D + 1].
        cu_seqlens_k: of the same documents within `keys`, [D + 1].
        keys: positions of the keys that the rank needs.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    keys: slice

    @classmethod
    def of(cls, cu_seqlens: Tensor, start: int, end: int) -> Llama3Bounds:
        """Return the bounds of the rank that holds [start, end); `cu_seqlens` go from 0 to the end of the last rank."""
        inner = cu_seqlens[(cu_seqlens > start) & (cu_seqlens < end)]
        first_key = int(cu_seqlens[cu_seqlens <= start].max())
        bounds = torch.cat([inner.new_tensor([start]), inner, inner.new_tensor([end])])
        cu_seqlens_k = bounds - first_key
        cu_seqlens_k[0] = 0
        return cls(bounds - start, cu_seqlens_k, slice(first_key, end))

    @property
    def max_seqlen_q(self) -> int:
        """The most rows of one document."""
        return int(self.cu_seqlens_q.diff().max())

    @property
    def max_seqlen_k(self) -> int:
        """The most keys of one document."""
        return int(self.cu_seqlens_k.diff().max())
