"""A balancer is a permutation of the tokens, cut into one slice for each rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.balance import (
    BALANCERS,
    MIXES,
    Balanced,
    Documents,
    Heads,
    Llama3Bounds,
    Sharding,
    Ulysses,
    ZigZagByDocument,
    simulate,
)
from cpcompile.balance.balanced import work
from cpcompile.balance.layout import local_length, positions
from cpcompile.balance.layout import of_groups as of_layout
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Segments
from cpcompile.errors import ConfigError, InputError
from cpcompile.runtime.attention.key_needs import needs
from cpcompile.runtime.schedule import Band, Visible, by_position

TIMELESS = settings(max_examples=50, deadline=None)
EACH = pytest.mark.parametrize("name", BALANCERS)
lengths = st.integers(1, 300)
world_sizes = st.integers(1, 64)


@st.composite
def packed(draw: st.DrawFn) -> tuple[int, list[int]]:
    """Return a length and boundaries of documents, some of which are empty."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any))
    return sum(sizes), [0, *torch.tensor(sizes).cumsum(0).tolist()]


def causal(length: int, bounds: list[int]) -> torch.Tensor:
    """Return which key each query sees, bool [length, length]."""
    at = torch.arange(length)
    document = torch.bucketize(at, torch.tensor(bounds), right=True)
    return (document[:, None] == document) & (at[:, None] >= at)


def held(sharding: Sharding, rank: int) -> list[int]:
    """Return the positions that a rank holds."""
    return [position for span in sharding.spans(rank) for position in range(span.position, span.end)]


@EACH
@TIMELESS
@given(packed(), world_sizes)
def test_every_token_is_held_once_and_the_order_is_restorable(
    name: str, packed: tuple[int, list[int]], world_size: int
) -> None:
    length, bounds = packed
    sharding = BALANCERS[name].shard(length, world_size, bounds)
    order, inverse = sharding.order(), sharding.inverse()
    assert len(order) == world_size * sharding.local_length
    assert sorted(order.tolist()) == list(range(len(order)))
    assert order[inverse].tolist() == list(range(length))
    shuffled = torch.randn(length + len(order))[order]
    assert torch.equal(shuffled[inverse][order[order < length]], shuffled[order < length])


@EACH
@TIMELESS
@given(packed(), world_sizes)
def test_spans_are_the_slots_in_order_with_padding_at_the_end(
    name: str, packed: tuple[int, list[int]], world_size: int
) -> None:
    length, bounds = packed
    sharding = BALANCERS[name].shard(length, world_size, bounds)
    assert sharding.length == length
    for rank, slots in enumerate(sharding.order().view(world_size, -1)):
        spans = sharding.spans(rank)
        tokens = len(slots) - int(sharding.padding[rank])
        assert slots[:tokens].tolist() == held(sharding, rank)
        assert (slots[tokens:] >= length).all()
        assert [span.slot for span in spans] == [sum(s.size for s in spans[:i]) for i in range(len(spans))]
        assert all(a.end < b.position for a, b in pairwise(spans)), "neighbours are one run"


@EACH
@TIMELESS
@given(packed(), st.integers(1, 12))
def test_work_and_keys_are_those_of_the_mask(name: str, packed: tuple[int, list[int]], world_size: int) -> None:
    length, bounds = packed
    mask, heads = causal(length, bounds), Heads(num_heads=6, num_kv_heads=3, head_dim=1, bytes_per_number=1)
    load = simulate(BALANCERS[name], length, world_size, bounds, heads)
    sharding = BALANCERS[name].shard(length, world_size, bounds)
    owned = [held(sharding, rank) for rank in range(world_size)]
    assert load.tokens.tolist() == [len(rows) for rows in owned]
    assert load.runs.tolist() == [len(sharding.spans(rank)) for rank in range(world_size)]
    assert load.area.sum() == pytest.approx(int(mask.sum()))
    if name == "ulysses":
        return
    assert load.area.tolist() == [int(mask[rows].sum()) for rows in owned]
    seen = [set(mask[rows].any(0).nonzero().flatten().tolist()) - set(rows) for rows in owned]
    assert load.key_bytes.tolist() == [2 * 3 * len(keys) for keys in seen]


@TIMELESS
@given(lengths, world_sizes, st.sampled_from(["contiguous", "zig_zag"]))
def test_layouts_are_those_of_the_compiler(length: int, world_size: int, layout: str) -> None:
    sharding = BALANCERS[layout].shard(length, world_size)
    assert sharding.local_length == local_length(length, world_size, layout)
    for rank in range(world_size):
        assert sharding.spans(rank) == by_position(TokenOrder(length, world_size, layout).spans[rank])
        there = positions(length, rank, world_size, layout)
        assert held(sharding, rank) == there[there < length].tolist()


@pytest.mark.parametrize("name", ["zig_zag_by_document", "striped"])
@TIMELESS
@given(packed(), world_sizes)
def test_tokens_are_equal_within_one(name: str, packed: tuple[int, list[int]], world_size: int) -> None:
    tokens = BALANCERS[name].shard(packed[0], world_size, packed[1]).tokens
    assert tokens.max() - tokens.min() <= 1


@TIMELESS
@given(packed(), world_sizes)
def test_balanced_tokens_are_equal_within_one_chunk(packed: tuple[int, list[int]], world_size: int) -> None:
    length, bounds = packed
    sharding = Balanced().shard(length, world_size, bounds)
    num_runs, tokens = int(sharding.ranks.bincount().max()), sharding.tokens
    assert tokens.max() - tokens.min() <= -(-length // (world_size * num_runs))


MIXED = [(name, p, per) for name in MIXES for p, per in ((2, 8192), (8, 8192), (64, 4096), (512, 2048))]


@pytest.mark.parametrize(("mix", "world_size", "tokens_per_rank"), MIXED)
def test_balanced_is_within_5_percent(mix: str, world_size: int, tokens_per_rank: int) -> None:
    """For the documents of many seeds, and lengths that no number of ranks divides."""
    for seed in range(3 if world_size > 64 else 10):
        generator = torch.Generator().manual_seed(seed)
        length = world_size * tokens_per_rank - 17 * seed
        bounds = MIXES[mix](length, generator)
        load = simulate(Balanced(), length, world_size, bounds)
        assert load.area.max() <= 1.05 * load.area.mean()
        assert load.area.min() >= 0.95 * load.area.mean()
        chunk = -(-load.tokens.max() // load.runs.max())
        assert load.tokens.max() - load.tokens.min() <= chunk


def test_balanced_needs_few_runs() -> None:
    """It finds the known answers where they are enough."""
    equal = list(range(0, 65, 8))
    assert Balanced().shard(64, 4, equal).ranks.tolist() == [0, 1, 2, 3], "whole documents: contiguous"
    one = Balanced().shard(64, 4)
    assert one.ranks.tolist() == [0, 1, 2, 3, 2, 1, 0], "one document: zig-zag, its middle joined"
    assert [one.spans(rank) for rank in range(4)] == [BALANCERS["zig_zag"].shard(64, 4).spans(r) for r in range(4)]
    assert Balanced(tolerance=1).shard(64, 4).ranks.tolist() == [0, 1, 2, 3], (
        "ranks are named in the order of the tokens"
    )
    for mix, most in {"giant": 3, "log_normal": 6, "tiny": 26}.items():
        bounds = MIXES[mix](8 * 8192, torch.Generator().manual_seed(0))
        assert simulate(Balanced(), 8 * 8192, 8, bounds).runs.max() <= most


@TIMELESS
@given(packed(), st.integers(1, 12), st.integers(1, 5), st.sampled_from(["balanced", "zig_zag_by_document"]))
def test_groups_share_what_they_are_dealt(packed: tuple[int, list[int]], num_groups: int, size: int, name: str) -> None:
    """Each rank of a group has an equal part of the slots of the group, in their order."""
    length, bounds = packed
    of_groups = BALANCERS[name].shard(length, num_groups, bounds)
    local = local_length(length, num_groups * size, name)
    sharding = of_groups.split(size, local)
    assert (sharding.world_size, sharding.local_length, sharding.length) == (num_groups * size, local, length)
    for group in range(num_groups):
        dealt = held(of_groups, group)
        parts = [held(sharding, group * size + i) for i in range(size)]
        assert [dealt[i * local : (i + 1) * local] for i in range(size)] == parts
    starts = tuple(torch.tensor(bounds).unique()[:-1].tolist())
    order = TokenOrder(length, num_groups * size, of_layout(name, size), Segments.of((starts,)))
    assert order.spans == tuple(sharding.spans(rank) for rank in range(num_groups * size))
    assert torch.cat([order.positions(rank) for rank in range(num_groups * size)]).sort().values.tolist() == [
        *range(num_groups * size * local)
    ]


def test_others_are_not_balanced() -> None:
    """The measure tells a good balancer from a bad one."""
    bounds = MIXES["log_normal"](8 * 8192, torch.Generator().manual_seed(0))
    found = {name: simulate(b, 8 * 8192, 8, bounds).area_imbalance for name, b in BALANCERS.items()}
    assert found["contiguous"] == found["llama3"] > found["zig_zag"] > 1.5
    assert max(found["zig_zag_by_document"], found["balanced"], found["striped"], found["ulysses"]) < 1.02
    assert simulate(BALANCERS["llama3"], 8 * 8192, 8).area_imbalance == pytest.approx(1.875, abs=1e-3)


def test_zig_zag_by_document_adds_no_padding() -> None:
    sharding = ZigZagByDocument().shard(1700, 8, list(range(0, 1701, 17)))
    assert sharding.local_length == 213
    assert int(sharding.padding.sum()) == 8 * 213 - 1700


PICTURES = {
    "contiguous": ([[0, 1, 2, 3], [4, 5, 6, 7]], [10, 26], [0, 8]),
    "llama3": ([[0, 1, 2, 3], [4, 5, 6, 7]], [10, 26], [0, 8]),
    "ulysses": ([[0, 1, 2, 3], [4, 5, 6, 7]], [18, 18], [0, 8]),
    "zig_zag": ([[0, 1, 6, 7], [2, 3, 4, 5]], [18, 18], [0, 8]),
    "zig_zag_by_document": ([[0, 3, 4, 7], [1, 2, 5, 6]], [10, 10], [0, 4, 8]),
    "striped": ([[0, 2, 4, 6], [1, 3, 5, 7]], [16, 20], [0, 8]),
    "balanced": ([[0, 1, 2, 5], [3, 4, 6, 7]], [12, 12], [0, 6, 8]),
}


@EACH
def test_picture_of_8_tokens_on_2_ranks(name: str) -> None:
    """The one in the docstring."""
    tokens, areas, bounds = PICTURES[name]
    sharding = BALANCERS[name].shard(8, 2, bounds)
    assert [held(sharding, rank) for rank in (0, 1)] == tokens
    assert simulate(BALANCERS[name], 8, 2, bounds).area.tolist() == areas
    drawn = (BALANCERS[name].__doc__ or "").replace(" |", "")
    for rank in (0, 1):
        assert f"rank {rank}: {' '.join(map(str, tokens[rank]))}" in drawn
    assert drawn.count(f"({areas[0]} pairs)") == (2 if areas[0] == areas[1] else 1)
    assert f"({areas[1]} pairs)" in drawn


def test_the_runtime_can_use_the_spans() -> None:
    """What the schedule says a rank must gather is what the simulator counts."""
    length, bounds = 640, [0, 100, 101, 400, 640]
    for name in ("zig_zag_by_document", "balanced", "striped"):
        sharding = BALANCERS[name].shard(length, 4, bounds)
        spans = tuple(sharding.spans(rank) for rank in range(4))
        visible = Visible(Band(None, 0), Segments.of((tuple(bounds[:-1]),)))
        mask = causal(length, bounds)
        for rank, gathered in enumerate(needs(spans, visible).held):
            got = {p for span in gathered for p in range(span.position, span.end)}
            assert set(mask[held(sharding, rank)].any(0).nonzero().flatten().tolist()) <= got


def test_ulysses_counts_whole_heads() -> None:
    heads = Heads(num_heads=4, num_kv_heads=2, head_dim=8, bytes_per_number=2)
    load = simulate(Ulysses(), 80, 8, heads=heads)
    assert load.area_imbalance == 2  # half of the ranks have no head
    assert load.key_bytes.tolist() == [0, 70 * 2 * 8 * 2] * 4
    assert simulate(Ulysses(), 80, 4, heads=heads).key_bytes.tolist() == [60 * 2 * 8 * 2] * 4
    shared = simulate(Ulysses(), 80, 2, heads=heads)
    assert shared.key_bytes.tolist() == [40 * 2 * 8 * 2] * 2


@TIMELESS
@given(packed(), st.integers(1, 8))
def test_llama3_bounds_are_the_mask(packed: tuple[int, list[int]], world_size: int) -> None:
    length, bounds = packed
    padded = -(-length // world_size) * world_size
    bounds = [*bounds, padded]
    mask, size = causal(padded, bounds), padded // world_size
    for rank in range(world_size):
        found = Llama3Bounds.of(torch.tensor(bounds, dtype=torch.int32), rank * size, rank * size + size)
        assert found.cu_seqlens_q.dtype == found.cu_seqlens_k.dtype == torch.int32
        seen = torch.zeros(size, padded, dtype=torch.bool)
        ends = zip(pairwise(found.cu_seqlens_q.tolist()), pairwise(found.cu_seqlens_k.tolist()), strict=True)
        for (first_q, end_q), (first_k, end_k) in ends:
            rows, columns = end_q - first_q, end_k - first_k
            square = torch.ones(rows, columns).tril(columns - rows).bool()
            seen[first_q:end_q, found.keys.start + first_k : found.keys.start + end_k] = square
        assert torch.equal(seen, mask[rank * size : rank * size + size])
        assert found.max_seqlen_q == max(b - a for a, b in pairwise(found.cu_seqlens_q.tolist()))
        assert found.max_seqlen_k == max(b - a for a, b in pairwise(found.cu_seqlens_k.tolist()))


def test_empty_documents_are_left_out() -> None:
    documents = Documents.of(7, [0, 0, 3, 3, 3, 7, 7])
    assert documents.starts.tolist() == [0, 3]
    assert documents.area == 6 + 10
    assert int(work(documents, BALANCERS["striped"].shard(7, 1)).sum()) == 16


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, 7], "the last boundary of cu_seqlens is 7, but there are 8 tokens: end it with the number of tokens"),
        ([0, 9], "the last boundary of cu_seqlens is 9, but there are 8 tokens"),
        ([1, 8], r"must be one row of boundaries that begins with 0, got \[1, 8\] of shape \[2\]"),
        ([], r"begins with 0, got \[\] of shape \[0\]"),
        ([[0, 8]], r"begins with 0, got \[0, 8\] of shape \[1, 2\]"),
        ([0, 5, 3, 8], r"must not decrease, got \[0, 5, 3, 8\]"),
    ],
)
def test_boundaries_that_do_not_fit(bounds: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Balanced().shard(8, 2, bounds)


def test_no_token_or_no_rank() -> None:
    with pytest.raises(InputError, match="a sequence of 0 tokens cannot be sharded"):
        Balanced().shard(0, 2)
    with pytest.raises(ConfigError, match="cannot be sharded over 0 ranks"):
        Balanced().shard(8, 0)


def test_zig_zag_by_document_favours_no_rank() -> None:
    """Documents of fewer tokens than ranks: no rank always has the last ones."""
    bounds = MIXES["tiny"](64 * 4096, torch.Generator().manual_seed(0))
    assert simulate(ZigZagByDocument(), 64 * 4096, 64, bounds).area_imbalance < 1.1
