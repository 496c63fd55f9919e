"""Layouts: which tokens each rank holds.

A layout is a permutation of the padded sequence, cut into equal slices. Lengths that do not divide are padded
at the global end; a padding slot has a position >= length, and causal attention never looks at it. 8 tokens
on 2 ranks, with the causal work of each:

    contiguous   rank 0: 0 1 2 3 (10 pairs)   rank 1: 4 5 6 7 (26 pairs)
    zig_zag      rank 0: 0 1 6 7 (18 pairs)   rank 1: 2 3 4 5 (18 pairs)

These are known when a model is compiled. The others follow the documents of each batch: how many slots a rank has is known
then, and which tokens are in them when the batch is there, see `token_order.py`. Where ranks exchange heads in groups, and groups
are a ring, it is the groups that documents are dealt to: `balanced:4` gives groups of 4 neighbours what `balanced` gives
ranks, and each rank of a group a quarter of that, in one piece as far as it is one.
"""

from __future__ import annotations

import torch

LAYOUTS = ("contiguous", "zig_zag")
DOCUMENT_LAYOUTS = ("zig_zag_by_document", "balanced")


def follows_documents(layout: str) -> bool:
    """Tell whether a layout depends on where the documents of a batch begin."""
    return without_groups(layout) in DOCUMENT_LAYOUTS


def without_groups(layout: str) -> str:
    """Return the layout that deals to ranks what this one deals to groups of them."""
    return layout.partition(":")[0]


def of_groups(layout: str, size: int) -> str:
    """Return the layout that deals documents to groups of `size` neighbouring ranks."""
    return f"{layout}:{size}" if size > 1 else layout


def is_of_groups(layout: str) -> bool:
    """Tell whether a name is that of a layout of groups."""
    name, _, size = layout.partition(":")
    return name in DOCUMENT_LAYOUTS and size.isdecimal() and int(size) > 1


def group_size(layout: str) -> int:
    """Return how many neighbouring ranks share what the documents are dealt to."""
    return int(layout.partition(":")[2] or 1)


def num_chunks(world_size: int, layout: str) -> int:
    """Return into how many equal, globally ordered chunks the padded sequence is cut."""
    if follows_documents(layout):
        raise ValueError(f"the layout {layout!r} has no equal chunks: its runs follow the documents of a batch")
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    return 2 * world_size if layout == "zig_zag" else world_size


def chunk_length(length: int, world_size: int, layout: str) -> int:
    """Return the tokens of one chunk, padding included. Works on symbolic lengths."""
    chunks = num_chunks(world_size, layout)
    return (length + chunks - 1) // chunks


def local_length(length: int, world_size: int, layout: str) -> int:
    """Return the token slots of one rank, padding included. Works on symbolic lengths."""
    if follows_documents(layout):
        return (length + world_size - 1) // world_size
    return chunk_length(length, world_size, layout) * (num_chunks(world_size, layout) // world_size)


def rank_chunks(rank: int, world_size: int, layout: str) -> tuple[int, ...]:
    """Return the chunks that `rank` holds, in the order in which it holds them."""
    return (rank, 2 * world_size - 1 - rank) if layout == "zig_zag" else (rank,)


def positions(length: int, rank: int, world_size: int, layout: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the global position of each token slot of `rank`, int64 `[local_length]`; padding slots are >= length."""
    size = chunk_length(length, world_size, layout)
    within = torch.arange(size, device=device)
    return torch.cat([within + chunk * size for chunk in rank_chunks(rank, world_size, layout)])


def inverse(length: int, world_size: int, layout: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return, for each token of the sequence, its slot in the ranks' slices laid end to end, int64 `[length]`."""
    order = torch.cat([positions(length, rank, world_size, layout, device) for rank in range(world_size)])
    return torch.argsort(order)[:length]
