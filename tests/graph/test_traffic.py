"""What ranks compute, send and hold, counted token by token here. `tests/gloo/test_traffic.py` counts what is really sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from cpcompile.balance.layout import local_length, positions
from cpcompile.balance.token_spans import Segments, Span
from cpcompile.runtime.attention import workload
from cpcompile.runtime.attention.workload import Workload, attention_bytes, memory_of, pairs, pieces_of, work_of
from cpcompile.runtime.schedule import Band, Piece, Visible
from cpcompile.runtime.traffic import Traffic, traffic

ops = torch.ops.cpcompile
BATCH, HEADS, KV_HEADS, DIM, ITEM = 2, 8, 2, 4, 2
CAUSAL = Visible(Band(None, 0))
TOKEN = BATCH * KV_HEADS * 2 * DIM * ITEM  # bytes of a token's keys and values
BANDS = {"causal": (None, 0), "window": (-6, 0), "both": (-3, 2), "full": (None, None)}


def problem_at(length: int = 64, layout: str = "zig_zag", world_size: int = 4, **changes: Any) -> Workload:
    made = Workload(BATCH, HEADS, KV_HEADS, DIM, DIM, ITEM, length, layout, world_size, CAUSAL)
    return replace(made, **changes)


def seen(length: int, low: int | None, high: int | None) -> torch.Tensor:
    """Return which keys each query sees."""
    at = torch.arange(length)
    distance = at - at[:, None]
    visible = torch.ones(length, length, dtype=torch.bool)
    visible &= distance >= low if low is not None else visible
    return visible & (distance <= high) if high is not None else visible


def held(p: Workload, rank: int) -> torch.Tensor:
    """Return the positions of a rank's tokens."""
    at = positions(p.length, rank, p.world_size, p.layout)
    return at[at < p.length]


def arguments(length: int = 64, layout: str = "zig_zag", world_size: int = 4, **changes: Any) -> dict[str, Any]:
    slots = local_length(length, world_size, layout)
    q, k = (torch.empty(BATCH, heads, slots, DIM, dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS))
    given: dict[str, Any] = dict.fromkeys(("mask", "documents", "key_padding"))
    given |= {"scale": 1.0, "is_causal": True, "window": 0, "softcap": 0.0, "q": q, "k": k, "v": k}
    return given | {"length": length, "layout": layout, "world_size": world_size} | changes


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("sizes", [(5, 7), (9, 4), (1, 1), (6, 6)])
def test_pairs_of_a_rectangle(sizes: tuple[int, int], band: tuple[int | None, int | None]) -> None:
    rows, columns = sizes
    for shift in range(-12, 13):
        low, high = (None if x is None else x + shift for x in band)
        i, j = torch.arange(rows)[:, None], torch.arange(columns)
        visible = (j - i >= (low if low is not None else -99)) & (j - i <= (high if high is not None else 99))
        piece = Piece(Span(0, 0, rows), Span(0, 0, columns), low, high)
        if low is None or high is None or low <= high + 1:
            assert pairs(piece) == int(visible.sum())


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("length", [31, 64])
def test_work_of_each_rank(length: int, layout: str, band: tuple[int | None, int | None]) -> None:
    p = problem_at(length, layout, visible=Visible(Band(*band)), inner_size=2)
    visible = seen(length, *band)
    for rank in range(4):
        own = BATCH * HEADS * int(visible[held(p, rank)].sum())
        assert work_of(p, "ring", rank) == work_of(p, "gather", rank) == work_of(p, "halo", rank) == own
        assert work_of(p, "ulysses", rank) == BATCH * HEADS // 4 * int(visible.sum())
        group = torch.cat([held(p, rank // 2 * 2 + i) for i in range(2)])
        assert work_of(p, "usp", rank) == BATCH * HEADS // 2 * int(visible[group].sum())
    assert sum(pairs(piece) for r in range(4) for piece in pieces_of(p, "ring", r)) == int(visible.sum())


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("length", [31, 64])
def test_only_needed_keys_travel(length: int, layout: str, band: tuple[int | None, int | None]) -> None:
    """A run of each chunk, from the first token that a row sees to the last."""
    p = problem_at(length, layout, visible=Visible(Band(*band)))
    visible = seen(length, *band)
    sent, fetched = [0] * 4, [0] * 4
    chunk = local_length(length, 4, layout) // (2 if layout == "zig_zag" else 1)
    for source in range(4):
        for receiver in set(range(4)) - {source}:
            for start in positions(length, source, 4, layout)[::chunk].tolist():
                columns = visible[held(p, receiver), start : start + chunk].any(0).nonzero().flatten().tolist()
                count = columns[-1] - columns[0] + 1 if columns else 0
                sent[source] += count
                fetched[receiver] += count
    assert attention_bytes(p, "ring")[0] == max(sent) * TOKEN
    assert attention_bytes(p, "ring")[1] == max(a + b for a, b in zip(sent, fetched, strict=True)) * TOKEN
    assert attention_bytes(p, "gather") == attention_bytes(p, "halo") == attention_bytes(p, "ring")


def test_traffic_of_operators() -> None:
    block = 16 * TOKEN
    # The rank that holds the middle sends both of its chunks to all; what it sends and fetches is the same for all ranks.
    assert traffic(ops.ring_attention.default, arguments()) == Traffic(3 * block, 9 * block // 2)
    assert traffic(ops.ring_attention.default, arguments(layout="contiguous")) == Traffic(3 * block, 3 * block)
    assert traffic(ops.gather_attention.default, arguments(is_causal=False)) == Traffic(3 * block, 6 * block)
    token = BATCH * 16 * DIM * ITEM  # a head of the local tokens; each rank has 2 query heads and 1 key head
    swapped = Traffic(3 * (4 + 2) * token, 3 * (2 + 4) * token)
    assert traffic(ops.ulysses_attention.default, arguments()) == swapped
    assert traffic(ops.usp_attention.default, arguments(inner_size=4)) == swapped
    again = Traffic(swapped.forward, swapped.backward + 3 * (4 + 2) * token)
    assert traffic(ops.ulysses_attention.default, arguments(keeps_heads=False)) == again
    assert traffic(ops.ulysses_attention.default, arguments(heads_per_message=1)) == again
    of_ring = traffic(ops.ring_attention.default, arguments())
    assert traffic(ops.usp_attention.default, arguments(inner_size=1)) == of_ring
    assert traffic(ops.shard_tokens.default, {"x": arguments()["q"], "world_size": 4}) == Traffic(0, 0)
    assert traffic(ops.ring_attention.default, arguments(world_size=1)) == Traffic(0, 0)


def test_traffic_of_a_window_grows_with_the_window_and_not_with_the_sequence() -> None:
    def sent(window: int, length: int) -> Traffic:
        return traffic(ops.halo_attention.default, arguments(length, "contiguous", window=window))

    assert sent(8, 64) == sent(8, 1 << 16) == Traffic(7 * TOKEN, 14 * TOKEN)
    assert sent(16, 1 << 16) == Traffic(15 * TOKEN, 30 * TOKEN)


def test_documents_that_nobody_read_hide_nothing() -> None:
    ids = torch.empty(BATCH, 64, dtype=torch.int64, device="meta")
    bounds = torch.empty(BATCH, 65, dtype=torch.int32, device="meta")
    unread = traffic(ops.ring_attention.default, arguments(documents=ids, bounds=bounds))
    assert unread == traffic(ops.ring_attention.default, arguments())
    known = problem_at(visible=Visible(Band(None, 0), Segments.of(((0, 32),))), layout="contiguous")
    assert attention_bytes(known, "ring")[0] == 16 * TOKEN  # to the other rank of the document


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("length", [48 * 8, 48 * 8 - 3])
def test_of_many_ranks_the_ends_and_the_middle_are_busiest(
    monkeypatch: pytest.MonkeyPatch, length: int, layout: str, band: tuple[int | None, int | None]
) -> None:
    p = problem_at(length, layout, 48, visible=Visible(Band(*band)))
    some = attention_bytes(p, "ring")
    monkeypatch.setattr(workload, "MOST_RANKS", 48)
    for cached in (workload.keys_sent, workload.sent_by_ranks):
        cached.cache_clear()
    all_of_them = attention_bytes(p, "ring")
    for cached in (workload.keys_sent, workload.sent_by_ranks):
        cached.cache_clear()
    assert some == all_of_them


def test_memory() -> None:
    p = problem_at(world_size=2)
    local = 32 * BATCH * (ITEM * 2 * (HEADS + KV_HEADS) * DIM + 4 * HEADS)  # q, k, v, out and lse
    assert memory_of(p, "ring").kept == memory_of(p, "gather").kept == local
    out, swapped = (32 * BATCH * ITEM * n * DIM for n in (HEADS, 2 * (HEADS + KV_HEADS)))
    assert memory_of(p, "ulysses") == workload.Memory(local + out, 0)
    assert memory_of(replace(p, keeps_heads=False), "ulysses") == workload.Memory(local, swapped)
    assert (
        memory_of(replace(p, kv_heads=HEADS, heads_per_message=1), "ulysses").received
        == 32 * BATCH * ITEM * 4 * HEADS * DIM // 2
    )
    assert memory_of(p, "ring").received == 32 * TOKEN
    assert memory_of(replace(p, world_size=4), "ring").received == 2 * 16 * TOKEN
    contiguous = replace(p, world_size=4, layout="contiguous")
    assert memory_of(contiguous, "gather").received == 3 * 16 * TOKEN
    windowed = replace(contiguous, length=1 << 12, visible=Visible(Band(-6, 0)))
    assert memory_of(windowed, "halo").received == 6 * TOKEN


def test_fewer_heads_a_message_hold_less() -> None:
    p = problem_at(kv_heads=8)
    at = {n: memory_of(replace(p, heads_per_message=n), "gather") for n in (0, 2, 8)}
    assert at[2].received == at[0].received // 2
    assert at[8] == at[0]
