"""Order: tokens go from the ranks' slices, laid end to end, to the user's order and back."""

from __future__ import annotations

import torch

from cpcompile.layout import chunk_length, inverse, local_length, positions, rank_chunks


def to_user_order(x: torch.Tensor, dim: int, length: int, layout: str, world_size: int) -> torch.Tensor:
    """Reorder `dim`, the ranks' slices laid end to end, to the user's order and drop the padding."""
    return x.index_select(dim, inverse(length, world_size, layout, x.device))


def to_rank_order(x: torch.Tensor, dim: int, length: int, layout: str, world_size: int) -> torch.Tensor:
    """Reorder `dim`, the user's tokens, to the ranks' slices laid end to end; padding slots are 0."""
    shape = list(x.shape)
    shape[dim] = world_size * local_length(length, world_size, layout)
    return x.new_zeros(shape).index_copy_(dim, inverse(length, world_size, layout, x.device), x)


def num_real(length: int, rank: int, world_size: int, layout: str) -> int:
    """Return how many of a rank's slots hold tokens. They come first: padding is at the global end, slots are in order."""
    size = chunk_length(length, world_size, layout)
    return sum(min(max(length - chunk * size, 0), size) for chunk in rank_chunks(rank, world_size, layout))


def source_positions(length: int, rank: int, world_size: int, layout: str, device: torch.device) -> torch.Tensor:
    """Return the token that each slot of `rank` is filled from; padding slots repeat the last token."""
    return positions(length, rank, world_size, layout, device).clamp_(max=length - 1)
