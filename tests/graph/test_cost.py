"""The cost model prefers what its estimates say, and the estimates grow with what they should grow with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.choice import CLOSE, choose
from cpcompile.choose.cost import compute_seconds, link, seconds
from cpcompile.choose.rates import GATHERING, LAYING, RATES
from cpcompile.runtime.attention.catalogue import STRATEGIES

SITE = AttentionSite(
    batch=1, heads=32, kv_heads=8, tokens=1 << 14, head_dim=128, value_dim=128, bytes_per_element=2, device="cuda",
    is_causal=True, window=0, is_additive=False,
)  # fmt: skip
LONG = replace(SITE, tokens=1 << 17)
WINDOW = replace(SITE, window=4096, tokens=1 << 16, kernel="flash")
TWO, EIGHT = Ranks(2), Ranks(8)


def chosen(site: AttentionSite, axis: Ranks, strategy: str = "auto", balancer: str = "auto") -> tuple[str, str]:
    choice = choose([site], strategy, balancer, axis)
    return choice.strategies[0], choice.layout


def test_zig_zag_balances_causal_work_and_contiguous_does_not() -> None:
    for strategy in ("ring", "gather"):
        balanced, unbalanced = (seconds(LONG, strategy, layout, EIGHT) for layout in ("zig_zag", "contiguous"))
        assert 1.7 < unbalanced / balanced < 2  # 15 of 64 parts against 8
    assert seconds(LONG, "ulysses", "zig_zag", EIGHT) == seconds(LONG, "ulysses", "contiguous", EIGHT)


def test_one_layout_serves_all_and_zig_zag_wins_for_causal_ring() -> None:
    choice = choose([LONG, replace(LONG, window=128)], "ring", "auto", EIGHT)
    assert choice.layout == "zig_zag"
    assert choice.strategies == ("ring", "ring")
    assert set(choice.estimates) == {("contiguous", "ring"), ("zig_zag", "ring")}


def test_estimates_are_of_all_attentions() -> None:
    """So that they can be compared: a strategy that computes a few of them is no cheaper for it."""
    sites = [LONG, replace(LONG, window=128), LONG]
    choice = choose(sites, "auto", "zig_zag", EIGHT)
    costs = [seconds(site, name, "zig_zag", EIGHT) for site, name in zip(sites, choice.strategies, strict=True)]
    assert "halo" in choice.strategies and len(set(choice.strategies)) == 2
    assert choice.taken == ("zig_zag", " + ".join(dict.fromkeys(choice.strategies)))
    assert choice.estimates[choice.taken] == sum(costs)
    assert choice.estimates["zig_zag", "ring"] == sum(seconds(site, "ring", "zig_zag", EIGHT) for site in sites)
    assert min(choice.estimates.values()) * CLOSE >= sum(costs)


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses", "usp"])
def test_what_is_asked_for_is_done(strategy: str) -> None:
    assert chosen(SITE, Ranks(4, inner_size=2), strategy, "contiguous") == (strategy, "contiguous")


def test_halo_is_for_windows_and_usp_for_pairs() -> None:
    assert chosen(WINDOW, TWO, "halo") == ("halo", "contiguous")
    assert chosen(SITE, TWO, "halo")[0] == "gather"
    assert chosen(SITE, TWO, "usp")[0] == "gather"
    one_side = replace(WINDOW, is_causal=False)
    assert chosen(one_side, TWO, "halo")[0] == "gather"
    assert chosen(replace(one_side, lookahead=8), TWO, "halo")[0] == "halo"
    assert "usp" not in SITE.strategies(EIGHT)
    assert "usp" in SITE.strategies(Ranks(8, inner_size=2))


def test_additive_masks_are_not_for_rings() -> None:
    biased = replace(SITE, is_additive=True)
    assert choose([biased, SITE], "ring", "auto", EIGHT).strategies == ("gather", "ring")
    assert set(biased.strategies(Ranks(8, inner_size=4))) == {"ulysses", "gather"}
    assert set(biased.strategies(Ranks(8, inner_size=8))) == {"ulysses", "gather", "usp"}


@pytest.mark.parametrize("site", [SITE, LONG, WINDOW, replace(SITE, has_documents=True)])
@pytest.mark.parametrize("axis", [TWO, Ranks(8, inner_size=4), Ranks(32, inner_size=8)])
def test_auto_takes_one_that_is_close_to_the_cheapest(site: AttentionSite, axis: Ranks) -> None:
    choice = choose([site], "auto", "auto", axis)
    found = choice.estimates[choice.layout, choice.strategies[0]]
    assert found <= CLOSE * min(choice.estimates.values())


def test_preferences_break_ties() -> None:
    """On two ranks a ring and Ulysses are close where attention is long."""
    ring, ulysses = (seconds(LONG, strategy, "zig_zag", TWO) for strategy in ("ring", "ulysses"))
    assert max(ring, ulysses) < CLOSE * min(ring, ulysses)
    assert chosen(LONG, TWO)[0] == "ulysses"
    assert chosen(SITE, TWO)[0] == "ring"  # laying the heads of fewer tokens counts for more
    assert list(STRATEGIES).index("ulysses") < list(STRATEGIES).index("ring")


def test_what_is_right_where() -> None:
    assert chosen(WINDOW, TWO) == ("ring", "contiguous")
    assert chosen(replace(LONG, has_documents=True), TWO) == ("ring", "balanced")
    assert choose([replace(LONG, has_documents=True)], "auto", "auto", TWO, follow=False).layout == "zig_zag"
    few_heads = replace(LONG, tokens=1 << 20, heads=3, kv_heads=3)
    assert chosen(few_heads, EIGHT) == ("ring", "zig_zag")
    assert chosen(replace(LONG, tokens=1 << 18), Ranks(32, inner_size=8)) == ("usp", "zig_zag")


def test_a_ring_hides_its_messages_when_there_is_much_work() -> None:
    ring, gather = (seconds(LONG, strategy, "zig_zag", EIGHT) for strategy in ("ring", "gather"))
    assert ring < gather
    # What remains is the last message.
    work = compute_seconds(LONG, LONG.workload(EIGHT, "zig_zag"), "ring")
    assert work < ring < 1.01 * work


def test_gather_by_heads_hides_what_gather_does_not() -> None:
    assert seconds(LONG, "gather", "zig_zag", Ranks(8, heads_per_message=1)) < seconds(LONG, "gather", "zig_zag", EIGHT)


def test_windows_cost_no_more_for_longer_sequences_but_for_their_work() -> None:
    def messages(site: AttentionSite) -> float:
        work = compute_seconds(site, site.workload(EIGHT, "contiguous"), "ring")
        return seconds(site, "ring", "contiguous", EIGHT) - work

    long = replace(WINDOW, tokens=1 << 19)
    assert messages(replace(WINDOW, tokens=1 << 20)) == pytest.approx(messages(long), rel=1e-6)
    assert messages(replace(long, window=8192)) > 1.5 * messages(long)


def test_gathered_keys_cost_passes_over_memory() -> None:
    long = replace(WINDOW, tokens=1 << 19)
    ring, halo = (seconds(long, strategy, "contiguous", EIGHT) for strategy in ("ring", "halo"))
    own = 2 * 2 * 8 * 128 * long.tokens // 8  # bytes of keys and values
    assert own / GATHERING < halo - ring < 1.2 * own / GATHERING


def test_links() -> None:
    assert link(SITE, EIGHT, 8) == link(replace(SITE, device="meta"), EIGHT, 8) == "symmetric"
    assert link(SITE, replace(EIGHT, transport="p2p"), 8) == "p2p"
    assert link(SITE, Ranks(16), 16) == "network"
    assert link(replace(SITE, device="cpu"), EIGHT, 8) == "cpu"
    slower = replace(TWO, transport="p2p")
    assert seconds(SITE, "ulysses", "zig_zag", slower) > seconds(SITE, "ulysses", "zig_zag", TWO)


def test_slower_kernels_cost_more_and_heads_that_do_not_divide_too() -> None:
    assert seconds(replace(SITE, kernel="flash"), "ring", "zig_zag", TWO) > seconds(SITE, "ring", "zig_zag", TWO)
    nine = replace(SITE, heads=9, kv_heads=9)
    ten = replace(SITE, heads=10, kv_heads=10)
    work = [compute_seconds(site, site.workload(TWO, "zig_zag"), "ulysses") for site in (nine, ten)]
    assert work[0] == work[1]


def test_no_attention_still_has_a_layout() -> None:
    assert choose([], "auto", "auto", TWO).strategies == ()


def test_heads_of_whole_documents_are_best_where_one_call_takes_many() -> None:
    packed = replace(LONG, has_documents=True, kernel="cudnn_varlen")
    for axis in (TWO, EIGHT):
        assert chosen(packed, axis) == ("ulysses", "contiguous")
    assert chosen(replace(packed, tokens=1 << 20, heads=3, kv_heads=3), EIGHT) == ("ring", "balanced")
    assert chosen(replace(packed, kernel="triton"), EIGHT) == ("ring", "balanced")


def test_documents_are_dealt_to_the_ranks_that_exchange_heads() -> None:
    packed = replace(LONG, has_documents=True, kernel="cudnn_varlen")
    grid = Ranks(8, inner_size=4)
    assert chosen(packed, grid, "usp", "balanced") == ("usp", "balanced:4")
    assert chosen(packed, grid, "usp", "zig_zag_by_document") == ("usp", "zig_zag_by_document:4")
    assert chosen(packed, grid, "usp", "balanced:4") == ("usp", "balanced:4")
    assert chosen(packed, grid, "usp", "zig_zag") == ("usp", "zig_zag")
    assert chosen(packed, TWO, "usp", "balanced") == ("gather", "balanced"), "no grid"
    # Asked for without usp, they follow the ranks: a second graph of the model asks for what the first one got.
    assert chosen(packed, grid, "auto", "balanced")[1] == "balanced"
    assert chosen(packed, grid, "ring", "balanced") == ("ring", "balanced")
    layouts = {layout for layout, _ in choose([packed], "auto", "auto", grid).estimates}
    assert layouts == {"contiguous", "zig_zag", "balanced", "balanced:4"}
    # Ranks that compute rows of their own have unequal shares of what a group is dealt.
    assert seconds(packed, "ring", "balanced:4", grid) > seconds(packed, "ring", "balanced", grid)
    # Heads for one axis of the mesh only: more hosts than heads.
    assert chosen(replace(packed, tokens=1 << 20), Ranks(64, inner_size=8)) == ("usp", "balanced:8")


def test_short_attentions_take_what_the_host_launches_soonest() -> None:
    short = replace(SITE, tokens=1 << 13)
    ring, ulysses = (seconds(short, strategy, "zig_zag", EIGHT) for strategy in ("ring", "ulysses"))
    assert 2 * ulysses < ring == seconds(replace(short, tokens=1 << 12), "ring", "zig_zag", EIGHT)
    assert seconds(short, "ring", "balanced", EIGHT) > ring
    assert chosen(short, EIGHT)[0] == "ulysses"
    on_cpus = replace(short, device="cpu")
    assert seconds(replace(on_cpus, tokens=1 << 12), "ring", "zig_zag", EIGHT) < seconds(
        on_cpus, "ring", "zig_zag", EIGHT
    )


def test_what_backward_computes_or_exchanges_again_is_counted() -> None:
    exchanged, again = replace(LONG, keeps_heads=False), replace(LONG, runs_again=True)
    forward, backward = RATES["cudnn"]
    for strategy in ("ring", "ulysses", "gather"):
        work = [compute_seconds(site, site.workload(EIGHT, "zig_zag"), strategy) for site in (LONG, exchanged, again)]
        assert work[0] == work[1]
        assert work[2] / work[0] == pytest.approx(
            (2 / forward + 2.5 / backward) / (1 / forward + 2.5 / backward), rel=1e-3
        )
    # Of Ulysses q, k, v and the output travel once more, one way; of a ring nothing does.
    rings, heads = ([seconds(x, name, "zig_zag", EIGHT) for x in (LONG, exchanged)] for name in ("ring", "ulysses"))
    assert rings[0] == rings[1]
    sent = 2 * LONG.tokens // 8 * 7 // 8 * 128 * (2 * 32 + 2 * 8)
    assert heads[1] - heads[0] >= sent / LAYING


def test_documents_leave_ranks_with_unequal_rows_or_small_kernels() -> None:
    packed = replace(LONG, has_documents=True)
    for strategy in ("ring", "ulysses"):
        assert seconds(packed, strategy, "zig_zag", TWO) > 1.1 * seconds(LONG, strategy, "zig_zag", TWO)
