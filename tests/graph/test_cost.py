"""The cost model counts the pairs that a rank computes, and prefers what its estimates say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpcompile.cost import Attention, choose, rank_area, seconds
from cpcompile.layout import positions

SITE = Attention(
    batch=1, heads=32, kv_heads=8, tokens=4096, head_dim=128, value_dim=128, bytes_per_element=2, device="cuda",
    is_causal=True, window=0, is_additive=False,
)  # fmt: skip


def pairs(tokens: int, rank: int, world_size: int, layout: str, window: int = 0) -> int:
    """Count the pairs of a rank one by one."""
    rows = positions(tokens, rank, world_size, layout)
    seen = rows[:, None] >= torch.arange(tokens)
    if window:
        seen &= rows[:, None] - torch.arange(tokens) < window
    return int(seen.sum())


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("window", [0, 16])
def test_area_is_close_to_the_number_of_pairs(layout: str, window: int) -> None:
    site = replace(SITE, tokens=512, window=window)
    for rank in range(4):
        assert rank_area(site, rank, 4, layout) == pytest.approx(pairs(512, rank, 4, layout, window), rel=0.15)


def test_zig_zag_balances_causal_work_and_contiguous_does_not() -> None:
    assert rank_area(SITE, 0, 8, "zig_zag") == rank_area(SITE, 7, 8, "zig_zag")
    assert rank_area(SITE, 7, 8, "contiguous") == 15 * rank_area(SITE, 0, 8, "contiguous")


def test_one_layout_serves_all_and_zig_zag_wins_for_causal_ring() -> None:
    long = replace(SITE, tokens=1 << 17)
    choice = choose([long, replace(long, window=128)], "ring", "auto", 8)
    assert choice.layout == "zig_zag"
    assert choice.strategies == ("ring", "ring")
    assert set(choice.estimates) == {("contiguous", "ring"), ("zig_zag", "ring")}


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_what_is_asked_for_is_done(strategy: str) -> None:
    assert choose([SITE], strategy, "contiguous", 4).strategies == (strategy,)
    assert choose([SITE], strategy, "contiguous", 4).layout == "contiguous"


def test_additive_masks_are_not_for_ring() -> None:
    biased = replace(SITE, is_additive=True)
    assert choose([biased, SITE], "ring", "auto", 4).strategies == ("gather", "ring")


def test_auto_takes_the_cheapest() -> None:
    choice = choose([SITE], "auto", "auto", 8)
    assert choice.estimates[choice.layout, choice.strategies[0]] == min(choice.estimates.values())


def test_ring_hides_its_traffic_when_there_is_much_work() -> None:
    long = replace(SITE, tokens=1 << 20)
    assert seconds(long, "ring", "zig_zag", 8) < seconds(long, "gather", "zig_zag", 8)


def test_no_attention_still_has_a_layout() -> None:
    assert choose([], "auto", "auto", 4).strategies == ()
