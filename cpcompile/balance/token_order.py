"""Token order: which tokens of a sequence each rank holds, once the documents of the batch are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from cpcompile.balance import BALANCERS, Documents, Sharding
from cpcompile.balance import layout as layouts
from cpcompile.balance.layout import chunk_length, follows_documents, group_size, rank_chunks, without_groups
from cpcompile.balance.token_spans import Segments, Span, Spans


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """The tokens of all ranks.

    Attributes:
        length: tokens of the sequence.
        world_size: ranks that share it.
        layout: a name of `layout.py`.
        documents: where documents begin, for a layout that follows them; None: the sequence is one document.
    """

    length: int
    world_size: int
    layout: str
    documents: Segments | None = None

    @classmethod
    def of(cls, length: int, world_size: int, layout: str, bounds: torch.Tensor | None = None) -> TokenOrder:
        """Return the order that an operator's arguments describe; `bounds` as `document_bounds` returns them."""
        follows = bounds is not None and follows_documents(layout)
        return cls(length, world_size, layout, segments_of(bounds) if follows and bounds is not None else None)

    @classmethod
    def of_call(cls, arguments: Mapping[str, Any]) -> TokenOrder:
        """Return the order of an operator with these arguments."""
        return cls.of(arguments["length"], arguments["world_size"], arguments["layout"], arguments.get("bounds"))

    @property
    def local_length(self) -> int:
        """The token slots of one rank, padding included."""
        return layouts.local_length(self.length, self.world_size, self.layout)

    @property
    def spans(self) -> tuple[Spans, ...]:
        """The runs of each rank, in the order of positions and without padding."""
        return _spans(self)

    def num_held(self, rank: int) -> int:
        """Return how many of a rank's slots hold tokens. They come first."""
        return sum(span.size for span in self.spans[rank])

    def positions(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the position of each slot of `rank`, int64 `[local_length]`; those of padding slots are >= length."""
        if follows_documents(self.layout):
            return _on(_permutation(self)[0][rank], device)
        return layouts.positions(self.length, rank, self.world_size, self.layout, device)

    def sources(self, rank: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return the token that each slot of `rank` is filled from; padding slots repeat the last token."""
        return self.positions(rank, device).clamp(max=self.length - 1)

    def inverse(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return, for each token, its slot in the ranks' slices laid end to end, int64 `[length]`."""
        if follows_documents(self.layout):
            return _on(_permutation(self)[1], device)
        return layouts.inverse(self.length, self.world_size, self.layout, device)


def segments_of(bounds: torch.Tensor) -> Segments | None:
    """Return the documents that `document_bounds` found, or None where the ids of some row come back."""
    rows = bounds.tolist() if bounds.shape[1] < 4096 else [row[: max(int(row[0]), 0) + 1].tolist() for row in bounds]
    if any(row[0] < 0 for row in rows):
        return None
    return Segments.of(tuple(tuple(row[1 : row[0] + 1]) for row in rows))


@lru_cache(maxsize=256)
def _spans(order: TokenOrder) -> tuple[Spans, ...]:
    ranks = range(order.world_size)
    if follows_documents(order.layout):
        sharding = _sharding(order)
        return tuple(sharding.spans(rank) for rank in ranks)
    size = chunk_length(order.length, order.world_size, order.layout)

    def of_rank(rank: int) -> Spans:
        chunks = enumerate(rank_chunks(rank, order.world_size, order.layout))
        spans = (Span(i * size, chunk * size, min(size, order.length - chunk * size)) for i, chunk in chunks)
        return tuple(span for span in spans if span.size > 0)

    return tuple(map(of_rank, ranks))


@lru_cache(maxsize=16)
def _sharding(order: TokenOrder) -> Sharding:
    rows = order.documents.rows if order.documents is not None else ((0,),)
    balancer, size = BALANCERS[without_groups(order.layout)], group_size(order.layout)
    of_groups = balancer.shard_documents(Documents.of_rows(order.length, rows), order.world_size // size)
    return of_groups.split(size, order.local_length) if size > 1 else of_groups


@lru_cache(maxsize=16)
def _permutation(order: TokenOrder) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the positions of each rank's slots, `[P, local_length]`, and the inverse."""
    sharding = _sharding(order)
    return sharding.order().view(order.world_size, -1), sharding.inverse()


def _on(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a copy on the device, for which the host does not wait."""
    if torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.clone()
