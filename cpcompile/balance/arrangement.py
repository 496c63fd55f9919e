"""Arrangement: how the ranks hold a dim that is made of several sequences, or of groups of elements for each token.

A dim of `[text, image]` on two ranks, each of which holds its part of either, with 2 and 4 tokens and the layout contiguous:

    rank 0: t0 i0 i1    rank 1: t1 i2 i3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from cpcompile.balance.layout import follows_documents
from cpcompile.balance.token_order import TokenOrder, segments_of
from cpcompile.balance.token_spans import Segments, Span, Spans

Part = tuple[int, int]  # tokens, and how many consecutive elements each of them has


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Sequences behind one another along a dim, each dealt to the ranks by the layout; positions count elements.

    Attributes:
        parts: the sequences in the order of their positions, which is that of a rank's slots too.
        world_size: ranks that share them.
        layout: which tokens of a sequence each rank holds.
        documents: where documents begin in the one sequence, for a layout that follows them.
    """

    parts: tuple[Part, ...]
    world_size: int
    layout: str
    documents: Segments | None = None

    @classmethod
    def of(cls, flat: Sequence[int], world_size: int, layout: str, bounds: torch.Tensor | None = None) -> Arrangement:
        """Return the arrangement that operators spell as `[tokens, elements, tokens, elements, ...]`."""
        parts = tuple(zip(flat[::2], flat[1::2], strict=True))
        follows = bounds is not None and follows_documents(layout)
        documents = segments_of(bounds) if follows and bounds is not None else None
        assert documents is None or len(parts) == 1, "only the sequence of the inputs has documents"
        return cls(parts, world_size, layout, documents)

    @property
    def length(self) -> int:
        """The elements of the dim."""
        return sum(tokens * elements for tokens, elements in self.parts)

    @property
    def local_length(self) -> int:
        """The slots of one rank, padding included."""
        return sum(self._order(tokens).local_length * elements for tokens, elements in self.parts)

    @property
    def spans(self) -> tuple[Spans, ...]:
        """The runs of each rank without padding."""
        return _spans(self)

    @property
    def spans_with_padding(self) -> tuple[Spans, ...]:
        """The runs of each rank, in which padding slots repeat the last token of their sequence."""
        return _spans_with_padding(self)

    def positions(self, rank: int) -> torch.Tensor:
        """Return the position of each slot of `rank`, int64 `[local_length]`; -1 in padding slots."""
        return self._laid(self.spans[rank])

    def sources(self, rank: int) -> torch.Tensor:
        """Return the position that each slot of `rank` is filled from; padding slots repeat the last token."""
        return self._laid(self.spans_with_padding[rank])

    def _laid(self, spans: Spans) -> torch.Tensor:
        found = torch.full((self.local_length,), -1)
        for span in spans:
            found[span.slots] = torch.arange(span.position, span.end)
        return found

    def inverse(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return, for each element, its slot in the ranks' slices laid end to end, int64 `[length]`."""
        return _inverse(self).to(device)

    def _order(self, tokens: int) -> TokenOrder:
        return TokenOrder(tokens, self.world_size, self.layout, self.documents)


@lru_cache(maxsize=256)
def _spans(arrangement: Arrangement) -> tuple[Spans, ...]:
    return tuple(_of_rank(arrangement, rank, padding=False) for rank in range(arrangement.world_size))


@lru_cache(maxsize=256)
def _spans_with_padding(arrangement: Arrangement) -> tuple[Spans, ...]:
    return tuple(_of_rank(arrangement, rank, padding=True) for rank in range(arrangement.world_size))


def _of_rank(arrangement: Arrangement, rank: int, *, padding: bool) -> Spans:
    found: list[Span] = []
    slot = position = 0
    for tokens, elements in arrangement.parts:
        order = TokenOrder(tokens, arrangement.world_size, arrangement.layout, arrangement.documents)
        held = order.spans[rank]
        found += [
            Span(slot + s.slot * elements, position + s.position * elements, s.size * elements) for s in held if s.size
        ]
        if padding:
            free = set(range(order.local_length)) - {i for s in held for i in range(s.slot, s.slot + s.size)}
            last = position + (tokens - 1) * elements
            found += [Span(slot + i * elements, last, elements) for i in sorted(free)]
        slot += order.local_length * elements
        position += tokens * elements
    return tuple(found)


@lru_cache(maxsize=64)
def _inverse(arrangement: Arrangement) -> torch.Tensor:
    order = torch.cat([arrangement.positions(rank) for rank in range(arrangement.world_size)])
    inverse = torch.empty(arrangement.length, dtype=torch.int64)
    held = order >= 0
    inverse[order[held]] = torch.arange(len(order))[held]
    return inverse
