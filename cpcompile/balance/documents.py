"""Documents of a packed sequence, and what causal attention within them computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.errors import InputError

Boundaries = Sequence[int] | Tensor  # cu_seqlens: 0, where each document ends


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """Where documents begin and end, none of them empty. The rows of a batch lie end to end.

    Attributes:
        length: tokens of the sequence.
        starts: int64 [D], ascending from 0.
        area_before: int64 [D], the pairs of query and key of all documents before.
        num_rows: rows of the batch; each has `length` tokens.
    """

    length: int
    starts: Tensor
    area_before: Tensor
    num_rows: int = 1

    @classmethod
    def of(cls, length: int, cu_seqlens: Boundaries | None = None) -> Documents:
        """Return the documents with these boundaries; None is one document. Empty documents are left out.

        Raises:
            InputError: there is no token, or the boundaries do not go from 0 to `length` without going back.
        """
        if length < 1:
            raise InputError(f"a sequence of {length} tokens cannot be sharded: pass at least one token")
        bounds = torch.as_tensor([0, length] if cu_seqlens is None else cu_seqlens, device="cpu").long()
        _check(length, bounds)
        return cls._between(bounds, length, 1)

    @classmethod
    def of_rows(cls, length: int, rows: Sequence[Sequence[int]]) -> Documents:
        """Return the documents of a batch, given where those of each row begin: 0 first, then ascending below `length`."""
        firsts = [torch.tensor(starts) + row * length for row, starts in enumerate(rows)]
        return cls._between(torch.cat([*firsts, torch.tensor([length * len(rows)])]), length, len(rows))

    @classmethod
    def _between(cls, bounds: Tensor, length: int, num_rows: int) -> Documents:
        starts, sizes = bounds[:-1], bounds.diff()
        starts, sizes = starts[sizes > 0], sizes[sizes > 0]
        areas = sizes * (sizes + 1) // 2
        return cls(length, starts, areas.cumsum(0) - areas, num_rows)

    @property
    def cuts(self) -> Tensor:
        """Where a document of some row begins, int64 ascending from 0."""
        return self.starts if self.num_rows == 1 else torch.unique(self.starts.remainder(self.length))

    def start_of(self, positions: Tensor) -> Tensor:
        """Return where the document of each token begins."""
        return self.starts[self._index(positions)]

    def area_until(self, ends: Tensor) -> Tensor:
        """Return the pairs of all tokens of all rows before each of `ends`, int64 in the shape of `ends`."""
        rows = (torch.arange(self.num_rows) * self.length).view(-1, *[1] * ends.ndim)
        return self._pairs_before(rows + ends).sum(0) - self._pairs_before(rows).sum(0)

    def _pairs_before(self, ends: Tensor) -> Tensor:
        index = self._index(ends)
        tokens = ends - self.starts[index]
        return self.area_before[index] + tokens * (tokens + 1) // 2

    @property
    def area(self) -> int:
        """The pairs of query and key of the sequence."""
        return int(self.area_until(torch.tensor(self.length)))

    def _index(self, positions: Tensor) -> Tensor:
        return torch.searchsorted(self.starts, positions, right=True) - 1


def _check(length: int, bounds: Tensor) -> None:
    if bounds.ndim != 1 or not len(bounds) or bounds[0] != 0:
        raise InputError(f"cu_seqlens must be one row of boundaries that begins with 0, got {_shown(bounds)}")
    if (bounds.diff() < 0).any():
        raise InputError(f"cu_seqlens must not decrease, got {_shown(bounds)}")
    if bounds[-1] != length:
        raise InputError(
            f"the last boundary of cu_seqlens is {int(bounds[-1])}, but there are {length} tokens: "
            "end it with the number of tokens, or cut the tokens to it"
        )


def _shown(bounds: Tensor) -> str:
    text = ", ".join(map(str, bounds.flatten()[:8].tolist()))
    return f"[{text}{', ...' if bounds.numel() > 8 else ''}] of shape {list(bounds.shape)}"
