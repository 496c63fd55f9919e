"""Placement: how the ranks of the context-parallel axis hold a tensor.

Exactly one logical axis is sharded, the tokens of the sequence. A tensor dim of size `outer * tokens * inner`
holds the tokens as its middle factor (`[B, S, D] -> [B*S, D]` gives outer B, inner 1); `outer` follows from
the size, so only `inner` is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Sharded:
    """Each rank holds its own tokens along `dim`; which tokens those are is the layout of the model.

    A slice along the tokens keeps all slots and leaves `front` tokens at the start and `back` at the end out
    of account: `x[:, :-1]` is sharded with back 1. Only tensors of the same range line up.
    """

    dim: int
    inner: int = 1
    front: int = 0
    back: int = 0

    def count(self, length: Any) -> Any:
        """Return how many of `length` tokens are in the range; works on symbolic lengths."""
        return length - self.front - self.back if self.front or self.back else length

    def __str__(self) -> str:
        inner = f", inner={self.inner}" if self.inner != 1 else ""
        cut = f", tokens {self.front}:{-self.back or ''}" if self.front or self.back else ""
        return f"Sharded({self.dim}{inner}{cut})"


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
