"""How heads are laid in the messages of an exchange."""

from __future__ import annotations

import weakref

import pytest
import torch

from cpcompile.runtime.attention.heads import Ranks, heads_of, heads_of_ranks, most_rounds, rounds
from cpcompile.runtime.attention.ulysses import Started, in_rounds
from cpcompile.runtime.transport.all_to_all import (
    HeadExchange,
    _by_rank,
    _evenly_apart,
    _gaps,
    _laid_ranks,
    _laid_runs,
    _within,
)
from cpcompile.runtime.transport.copies import Copies, has_wide_rows, kind_of, like


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("head_dim", "is_wide"), [(8, True), (3, False)])
def test_runs_of_heads_are_copied_bit_by_bit(dtype: torch.dtype, head_dim: int, is_wide: bool) -> None:
    x = torch.randn(2, 5, 6, head_dim).to(dtype)
    x[0, 1, 2, 0] = -torch.nan
    runs = _by_rank(x.transpose(1, 2), [slice(0, 2), slice(2, 4), slice(4, 6)], 4)
    to = torch.full_like(runs, 7.0, memory_format=torch.contiguous_format)
    assert has_wide_rows(runs) == has_wide_rows(to) == is_wide
    copies = Copies.of([(0, to, 1, runs)], [to, x])
    assert bool(copies.wide) == is_wide
    copies.make([to, x])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(to.view(bits), runs.contiguous().view(bits))


def test_heads_of_documents_go_around_a_ring_in_one_round() -> None:
    found = [
        most_rounds("balanced:2", is_ring=True),
        most_rounds("balanced", is_ring=False),
        most_rounds("zig_zag", True),
    ]
    assert found == [1, 2, 2]
    assert [len(rounds(2, 8, 4, most)) for most in (1, 2)] == [1, 2]
    assert rounds(2, 8, 4, 1) == (tuple(heads_of(rank, 2, 8, 4) for rank in (0, 1)),)


@pytest.mark.parametrize("sizes", [(2, 8, 4), (2, 9, 3), (3, 8, 4), (4, 2, 1), (4, 14, 2), (1, 6, 6)])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_groups_of_heads_are_all_heads_once(sizes: tuple[int, int, int], at_once: int) -> None:
    each = rounds(*sizes, at_once=at_once)
    for rank, whole in enumerate(heads_of_ranks(*sizes)):
        parts = [ranks[rank] for ranks in each]
        assert all(part.num_key <= at_once for part in parts)
        assert [head for part in parts for head in range(part.start, part.stop)] == [*range(whole.start, whole.stop)]
        keys = [key for part in parts for key in range(part.key_start, part.key_stop)]
        assert keys == [*range(whole.key_start, whole.key_stop)]
        read = [{head // part.group for head in range(part.start, part.stop)} for part in parts]
        assert read == [{*range(part.key_start, part.key_stop)} for part in parts]


def test_two_rounds_have_memory() -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    there: list[int] = []

    nothing = Copies.of([], [])

    def start(ranks: Ranks) -> Started:
        x = torch.empty(1)
        made.append(weakref.ref(x))
        there.append(sum(other() is not None for other in made))
        return [x], HeadExchange(None, nothing, [x])

    in_rounds(rounds(2, 8, 8, at_once=1), start, lambda ranks, tensors: HeadExchange(None, nothing, []))
    assert there == [1, 2, 2, 2]


def test_gaps() -> None:
    assert list(_gaps([slice(6, 8), slice(0, 2)], 9)) == [slice(2, 6), slice(8, 9)]
    assert list(_gaps([], 3)) == [slice(0, 3)]


def test_a_rank_in_the_middle_lays_its_own_heads_and_tokens_too() -> None:
    heads = [slice(at, at + 2) for at in (0, 2, 4, 6)]
    assert [_laid_ranks(heads, rank) for rank in (0, 1)] == [[1, 2, 3], [0, 1, 2, 3]]
    assert _laid_runs([slice(0, 4)], 8) == [slice(4, 8)]
    assert _laid_runs([slice(2, 4)], 8) == [slice(0, 8)]
    assert _within(slice(5, 7), [slice(0, 2), slice(4, 8)]) == slice(3, 5)


@pytest.mark.parametrize("first", [0, 1, 8])
@pytest.mark.parametrize("head_dim", [8, 3])
def test_copies_are_made_again_for_tensors_alike(head_dim: int, first: int) -> None:
    def made(fill: float | None = None) -> torch.Tensor:
        room = torch.randn(first + 6 * 4 * head_dim) if fill is None else torch.full((first + 24 * head_dim,), fill)
        return room[first:].view(6, 4, head_dim)

    tensors = [made(), made(0.0), made(0.0)]
    drafts = [like(kind_of(x)) for x in tensors]
    assert [*map(kind_of, drafts)] == [*map(kind_of, tensors)]
    pairs = [(1, drafts[1][2:4, 1:3], 0, drafts[0][:2, 2:]), (2, drafts[2], 0, drafts[0])]
    copies = Copies.of(pairs, drafts)
    assert len(copies.wide) == (head_dim == 8 and first != 1)
    for _ in range(2):
        tensors[0].normal_()
        copies.make(tensors)
        expected = torch.zeros_like(tensors[1])
        expected[2:4, 1:3] = tensors[0][:2, 2:]
        assert torch.equal(tensors[1], expected)
        assert torch.equal(tensors[2], tensors[0])
