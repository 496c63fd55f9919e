"""Placement: how the ranks of the context-parallel axis hold a tensor.

Exactly one logical axis is sharded: the tokens of the sequence, or of each sequence that the model reads. A tensor
dim of size `outer * tokens * inner` holds the tokens as its middle factor (`[B, S, D] -> [B*S, D]` gives outer B,
inner 1); `outer` follows from the size, so only `inner` is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Sharded:
    """Each rank holds its own tokens along `dim`; which tokens those are is the layout of the model.

    A slice along the tokens keeps all slots and leaves `front` tokens at the start and `back` at the end out
    of account: `x[:, :-1]` is sharded with back 1. Only tensors of the same range line up. A range may reach
    outside the sequence (`F.pad` makes `front` or `back` negative): those tokens have no slot, and all hold the
    number `outside`, or are not known if that is None.

    A model may read several sequences, an encoder's and a decoder's; `sequence` numbers the one that is meant.
    """

    dim: int
    inner: int = 1
    front: int = 0
    back: int = 0
    sequence: int = 0
    outside: float | None = None

    def count(self, length: Any) -> Any:
        """Return how many of `length` tokens are in the range; works on symbolic lengths."""
        return length - self.front - self.back if self.front or self.back else length

    @property
    def covers_all(self) -> bool:
        """Whether the range is all tokens."""
        return self.front == self.back == 0

    @property
    def reaches_outside(self) -> bool:
        """Whether the range holds tokens that have no slot."""
        return self.front < 0 or self.back < 0

    def with_range(self, front: int, back: int, outside: float | None = None) -> Sharded:
        """Return this placement with another range; `outside` counts only for one that reaches outside."""
        return replace(self, front=front, back=back, outside=outside if front < 0 or back < 0 else None)

    def is_shift_of(self, other: Sharded) -> bool:
        """Whether `other` holds as many tokens of the same dim in other slots, and both have a slot for each."""
        same = replace(self, front=other.front, back=other.back, outside=other.outside) == other
        inside = not (self.reaches_outside or other.reaches_outside)
        return same and inside and self.front + self.back == other.front + other.back

    def __str__(self) -> str:
        inner = f", inner={self.inner}" if self.inner != 1 else ""
        cut = f", tokens {self.front}:{-self.back or ''}" if self.front or self.back else ""
        sequence = f", sequence {self.sequence}" if self.sequence else ""
        return f"Sharded({self.dim}{inner}{cut}{sequence})"


# In place of the number of a sequence: a dim that holds no tokens, of which each rank gets a part in exchange for all tokens.
CHANNELS = -1


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
