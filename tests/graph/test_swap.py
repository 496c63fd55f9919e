"""How heads are laid in the messages of an exchange."""

from __future__ import annotations

import torch

from cpcompile.runtime.swap import _by_rank, _evenly_apart, _gaps


def test_ranks_whose_heads_are_evenly_apart_are_laid_at_once() -> None:
    before, after = [slice(0, 2), slice(3, 5), slice(6, 8)], [slice(12, 14), slice(15, 17)]
    assert _evenly_apart([*before, *after]) == [before, after]
    assert _evenly_apart([slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 4)]) == [
        [slice(0, 2)],
        [slice(2, 3), slice(3, 4)],
    ]


def test_heads_that_ranks_share_are_apart() -> None:
    shared = [slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2)]
    assert _evenly_apart(shared) == [shared[:1], shared[1:3], shared[3:]]
    overlapping = [slice(0, 2), slice(1, 3), slice(2, 4)]
    assert _evenly_apart(overlapping) == [overlapping]


def test_heads_by_rank() -> None:
    x = torch.arange(2 * 7 * 5 * 3).view(2, 7, 5, 3)
    heads = [slice(1, 3), slice(3, 5), slice(5, 7)]
    assert torch.equal(_by_rank(x, heads, 4), torch.stack([x[:, own, :4].permute(2, 0, 1, 3) for own in heads]))


def test_gaps() -> None:
    assert list(_gaps([slice(6, 8), slice(0, 2)], 9)) == [slice(2, 6), slice(8, 9)]
    assert list(_gaps([], 3)) == [slice(0, 3)]
