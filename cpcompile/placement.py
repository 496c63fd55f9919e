"""Placement: how the ranks of the context-parallel axis hold a tensor.

Exactly one logical axis is sharded, the tokens of the sequence. A tensor dim of size `outer * tokens * inner`
holds the tokens as its middle factor (`[B, S, D] -> [B*S, D]` gives outer B, inner 1); `outer` follows from
the size, so only `inner` is kept.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sharded:
    """Each rank holds its own tokens along `dim`; which tokens those are is the layout of the model."""

    dim: int
    inner: int = 1

    def __str__(self) -> str:
        return f"Sharded({self.dim})" if self.inner == 1 else f"Sharded({self.dim}, inner={self.inner})"


@dataclass(frozen=True, slots=True)
class Full:
    """Every rank holds all of it. `tokens` says where the tokens are known to be, if they are known."""

    tokens: Sharded | None = None

    def __str__(self) -> str:
        return "Full"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every rank holds an addend; the value is the sum over the ranks."""

    def __str__(self) -> str:
        return "Partial(sum)"


Placement = Full | Sharded | Partial
FULL = Full()
PARTIAL = Partial()
