"""Cost model: what each strategy and layout costs an attention, in estimated seconds of the slowest rank, forward and backward.

Work is the mask area that a rank computes; traffic is what it sends. Ring hides its traffic behind its work,
the others do not. The rates are those of one device kind, so that only their ratio matters; `explain` prints
the estimates behind a choice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cpcompile.layout import LAYOUTS, num_chunks, rank_chunks

FLOPS = {"cuda": 400e12, "cpu": 100e9}  # bf16 attention on an H100, fp32 on a few cores
BYTES = {"cuda": 200e9, "cpu": 2e9}  # NVLink between two GPUs, loopback
BACKWARD = 2.5  # five products against two
OVERLAP = 0.9  # the part of the shorter of work and traffic that ring hides


@dataclass(frozen=True, slots=True)
class Attention:
    """What the cost of an attention depends on. Sizes are those of the whole problem."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    value_dim: int
    bytes_per_element: int
    device: str
    is_causal: bool
    window: int
    is_additive: bool

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies that are exact here.

        An additive mask may hide every key with a finite bias; such rows average over all keys, which merging
        blocks cannot keep exactly.
        """
        return ("ulysses", "gather") if self.is_additive else ("ulysses", "ring", "gather")


def rank_area(site: Attention, rank: int, world_size: int, layout: str) -> float:
    """Return how many query-key pairs `rank` computes for one head when it holds its query rows."""
    chunk = site.tokens / num_chunks(world_size, layout)
    area = 0.0
    for index in rank_chunks(rank, world_size, layout):
        row = (index + 0.5) * chunk  # keys that the middle row of the chunk sees
        seen = row if site.is_causal else site.tokens
        area += chunk * (min(seen, site.window) if site.window else seen)
    return area


def seconds(site: Attention, strategy: str, layout: str, world_size: int) -> float:
    """Return the estimated seconds of one attention, forward and backward, on the slowest rank."""
    per_head = 2.0 * (site.head_dim + site.value_dim) * site.batch * (1 + BACKWARD)
    local = site.batch * site.tokens / world_size * site.bytes_per_element
    kv_bytes = local * site.kv_heads * (site.head_dim + site.value_dim)
    others = world_size - 1
    if strategy == "ulysses":
        whole = rank_area(site, 0, 1, "contiguous")
        work = math.ceil(site.heads / world_size) * whole * per_head
        head_bytes = site.heads * site.head_dim + max(site.kv_heads, world_size) * (site.head_dim + site.value_dim)
        traffic = 2.0 * local * (head_bytes + site.heads * site.value_dim) * others / world_size
    else:
        areas = [rank_area(site, rank, world_size, layout) for rank in {0, world_size // 2, world_size - 1}]
        work = site.heads * max(areas) * per_head
        traffic = others * kv_bytes * (4.0 if strategy == "ring" else 2.0)  # ring: KV twice, and their gradients
    compute, transfer = work / FLOPS[_kind(site)], traffic / BYTES[_kind(site)]
    if strategy == "ring":  # no overlap is perfect
        return max(compute, transfer) + (1 - OVERLAP) * min(compute, transfer)
    return compute + transfer


def _kind(site: Attention) -> str:
    return "cuda" if site.device == "cuda" else "cpu"


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, the strategy of each attention, and the estimates that led to them."""

    layout: str
    strategies: tuple[str, ...]
    estimates: dict[tuple[str, str], float]


def choose(sites: list[Attention], strategy: str, balancer: str, world_size: int) -> Choice:
    """Choose what costs least among what was asked for; `auto` leaves all open. One layout serves all attentions."""
    layouts = LAYOUTS if balancer == "auto" else (balancer,)
    best: tuple[float, Choice] | None = None
    estimates: dict[tuple[str, str], float] = {}
    for layout in layouts:
        chosen, total = [], 0.0
        for site in sites:
            allowed = [s for s in site.strategies if strategy in ("auto", s)] or [site.strategies[-1]]
            costs = {name: seconds(site, name, layout, world_size) for name in allowed}
            name = min(costs, key=costs.__getitem__)
            chosen.append(name)
            total += costs[name]
            for key, cost in costs.items():
                estimates[layout, key] = estimates.get((layout, key), 0.0) + cost
        if best is None or total < best[0]:
            best = total, Choice(layout, tuple(chosen), estimates)
    assert best is not None
    return best[1]
