"""A layout is a permutation of the padded sequence, cut into equal slices."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpcompile.balance import layout as module
from cpcompile.balance.layout import LAYOUTS, inverse, local_length, num_chunks, positions
from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions.slices import join, split
from cpcompile.ir.placement import Sharded


@given(st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(LAYOUTS))
def test_ranks_hold_every_token_once(length: int, world_size: int, layout: str) -> None:
    held = torch.cat([positions(length, rank, world_size, layout) for rank in range(world_size)])
    assert len(held) == world_size * local_length(length, world_size, layout)
    assert sorted(held.tolist()) == list(range(len(held)))
    assert held[inverse(length, world_size, layout)].tolist() == list(range(length))


@given(
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from(LAYOUTS),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)
def test_split_and_join_undo_each_other(length: int, world_size: int, layout: str, outer: int, inner: int) -> None:
    whole = torch.arange(2 * outer * length * inner).view(2, -1)
    parts = split(whole, Sharded(1, inner), TokenOrder(length, world_size, layout))
    assert {part.shape[1] for part in parts} == {outer * local_length(length, world_size, layout) * inner}
    assert torch.equal(join(parts, Sharded(1, inner), TokenOrder(length, world_size, layout)), whole)


def test_picture_of_8_tokens_on_2_ranks() -> None:
    """The one in the docstring, which has a line for each layout."""
    drawn = {}
    for line in (module.__doc__ or "").splitlines():
        if ranks := re.findall(r"rank \d: ([\d ]+) \((\d+) pairs\)", line):
            drawn[line.split()[0]] = [([int(p) for p in tokens.split()], int(pairs)) for tokens, pairs in ranks]
    held = {layout: [positions(8, rank, 2, layout).tolist() for rank in (0, 1)] for layout in LAYOUTS}
    assert drawn == {layout: [(own, sum(p + 1 for p in own)) for own in ranks] for layout, ranks in held.items()}


def test_padding_is_at_the_global_end() -> None:
    assert [positions(5, rank, 2, "zig_zag").tolist() for rank in (0, 1)] == [[0, 1, 6, 7], [2, 3, 4, 5]]


def test_unknown_layout_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown layout 'spiral': expected one of contiguous, zig_zag"):
        num_chunks(2, "spiral")
