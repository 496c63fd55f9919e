"""Cost model: what each strategy and layout costs an attention, in estimated seconds of the slowest rank, forward and backward.

Work is the (query, key) pairs of a rank at the rate of its kernel; traffic is the bytes that it sends, exactly, at the rate of
its links. A ring hides its messages behind its work but for the last one, `gather` and the exchange of heads all but the first
or last of each kind. No attention is done before its host has launched it. Packed documents, which nobody has read yet, are
taken for one; ranks that compute rows of their own may then have unequal work, ranks that compute heads have not. `explain`
prints the estimates.
"""

from __future__ import annotations

import math
from functools import lru_cache

from cpcompile.balance.layout import follows_documents, group_size
from cpcompile.choose.attention import AttentionSite, Ranks
from cpcompile.choose.machine import H100, Machine, Rates
from cpcompile.choose.rates import (
    BACKWARD_SLOPE,
    CPU,
    FORWARD_SLOPE,
    FULL_KEYS,
    GATHERING,
    HOST,
    HOST_OF_DOCUMENTS,
    LATENCY,
    LAYING,
    MEMORY,
    NARROW,
    NARROW_ELSEWHERE,
    NARROW_HEADS,
    PACKED,
    PACKED_ELSEWHERE,
    PRODUCTS,
    SLOWDOWN,
    UNEVEN,
)
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.heads import most_rounds, rounds
from cpcompile.runtime.attention.workload import Workload, keys_sent, pairs, pieces_of, sampled, sent_by_ranks
from cpcompile.runtime.schedule import Piece


@lru_cache(maxsize=1024)
def seconds(site: AttentionSite, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the estimated seconds of one attention, forward and backward, on the slowest rank."""
    return max(device_seconds(site, strategy, layout, axis), host_seconds(site, strategy, layout, axis))


def device_seconds(site: AttentionSite, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the seconds of the slowest rank whose host is ahead: of its kernels, and of messages that these do not hide."""
    workload = site.workload(axis, layout)
    work = compute_seconds(site, workload, strategy, axis.machine)
    inner = workload.inner(strategy)
    if STRATEGIES[strategy].is_latent:
        work += expansion_seconds(site, axis, parts=inner)
    if strategy == "latent":
        return work
    ranks = sent_by_ranks(workload, strategy)
    runs = forwards(site)
    keys = max(runs * r.forward_keys + r.backward_keys for r in ranks)
    swapped = max(runs * r.forward_swap + r.backward_swap for r in ranks)
    total = work
    if keys:
        hops = max(traffic.sources for traffic in keys_sent(workload, strategy).values())
        kinds = runs + 2  # keys in each pass, and their gradients
        messages = kinds * (math.ceil(site.kv_heads / axis.heads_per_message) if axis.heads_per_message else 1)
        # A ring waits for one message of them all, `gather` for the first of each kind.
        count, shown = (messages, kinds) if STRATEGIES[strategy].is_at_once else (kinds * hops, 1)
        total += _exposed(keys, count, shown, work, link(site, axis, axis.world_size), axis)
        if STRATEGIES[strategy].is_at_once and is_gpu(site):
            own = workload.key_width * workload.itemsize * site.kv_heads * site.tokens // axis.world_size
            total += (own + max(r.forward_keys for r in ranks)) / GATHERING
    if swapped:
        most = most_rounds(layout, is_ring=inner < axis.world_size)
        kinds = 2 * runs + 2  # to heads and back in each pass
        count = kinds * len(rounds(inner, site.heads, site.kv_heads, most, axis.heads_per_message))
        total += _exposed(swapped, count, kinds, work, link(site, axis, inner), axis)
        total += swapped / LAYING if is_gpu(site) else 0.0
    return total


def forwards(site: AttentionSite) -> int:
    """Return how many times the forward of an attention runs in a step."""
    return 2 if site.runs_again else 1


def host_seconds(site: AttentionSite, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the seconds that the host takes to launch an attention and its gradient on a GPU; on a CPU it computes itself."""
    if not is_gpu(site) or strategy not in HOST or axis.world_size == 1:
        return 0.0
    workload = site.workload(axis, layout)
    inner = workload.inner(strategy)
    hops = max(traffic.sources for traffic in keys_sent(workload, strategy).values())
    least, of_keys, of_heads = (HOST_OF_DOCUMENTS if _deals_evenly(layout, inner) else HOST)[strategy]
    return least + of_keys * (1 + hops) + of_heads * inner


def compute_seconds(site: AttentionSite, workload: Workload, strategy: str, machine: Machine = H100) -> float:
    """Return the seconds of the kernels of the slowest rank."""
    rates = rates_on(machine if is_gpu(site) else None, site.kernel, max(site.head_dim, site.value_dim))
    inner = workload.inner(strategy)
    heads = site.batch * max(h.num_query for h in workload.heads_of(strategy))
    per_pair = 2.0 * (site.head_dim + site.value_dim) * heads

    def of(piece: Piece) -> float:
        forward, backward = piece_seconds(piece, per_pair, rates)
        return forwards(site) * forward + backward

    whole = max(sum(map(of, pieces_of(workload, strategy, at))) for at in sampled(workload.world_size // inner))
    return whole * _of_documents(site, workload, inner)


def rates_on(machine: Machine | None, kernel: str, head_dim: int = 128) -> Rates:
    """Return the rates of a kernel on heads of this width; None: on a CPU."""
    if machine is None:
        return CPU
    share = NARROW.get(kernel, NARROW_ELSEWHERE) if head_dim <= NARROW_HEADS else 1.0
    forward, backward = machine.rates(kernel)
    return forward * share, backward * share


def products_on(machine: Machine | None) -> float:
    """Return the FLOP/s that dense products reach; None: on a CPU."""
    return PRODUCTS["cpu"] if machine is None else machine.products


def bandwidth_on(machine: Machine | None) -> float:
    """Return the bytes a second that kernels read and write; None: on a CPU."""
    return MEMORY["cpu"] if machine is None else machine.bandwidth


def piece_seconds(piece: Piece, per_pair: float, rates: Rates) -> tuple[float, float]:
    """Return the seconds of a rectangle in forward and in backward; `per_pair`: operations of forward for a query and a key."""
    count = pairs(piece)
    if not count:
        return 0.0, 0.0
    size = min(1.0, count / piece.rows.size / FULL_KEYS)
    forward, backward = rates[0] * size**FORWARD_SLOPE, rates[1] * size**BACKWARD_SLOPE
    return per_pair * count / forward, per_pair * count * 2.5 / backward  # five products against two


def _of_documents(site: AttentionSite, workload: Workload, inner: int) -> float:
    """Return by how much packed documents take longer than one of the same area; `inner` ranks compute heads of the same rows."""
    if not site.has_documents:
        return 1.0
    of_rows, of_heads = PACKED.get(site.kernel, PACKED_ELSEWHERE)
    if inner == 1:
        of_heads = 1.0
    if inner == workload.world_size:
        return of_heads
    return max(of_heads, of_rows) * (1.0 if _deals_evenly(workload.layout, inner) else UNEVEN)


def _deals_evenly(layout: str, inner: int) -> bool:
    """Tell whether the layout gives equal work of documents to ranks, or to the groups of `inner` that compute the same rows."""
    return follows_documents(layout) and group_size(layout) in (1, inner)


def expansion_seconds(site: AttentionSite, axis: Ranks, parts: int = 1) -> float:
    """Return the seconds by which a latent costs more than the work of the attention; nothing of it is hidden.

    Keys and values of all tokens are computed in forward and again in backward, whose two products take twice as long; other
    strategies do this once, for the tokens of a rank. Each time they are written and read. `parts`: how many ranks share it.
    """
    assert site.latent is not None
    machine, num_ranks = axis.machine if is_gpu(site) else None, axis.world_size
    products = site.latent.flops * (4 / parts - 3 / num_ranks) / products_on(machine)
    memory = site.latent.key_bytes * 2 * (3 / parts - 2 / num_ranks) / bandwidth_on(machine)
    kind = link(site, axis, num_ranks)
    sent = 2 * site.latent.latent_bytes * (num_ranks - 1) / num_ranks
    travel = sent / axis.machine.bytes_per_second("p2p" if kind == "symmetric" else kind)
    return site.tokens * (products + memory + travel) + 2 * site.latent.messages * LATENCY


def link(site: AttentionSite, axis: Ranks, num_ranks: int) -> str:
    """Return what connects so many ranks, a key of `BYTES`."""
    return link_on(axis.machine if is_gpu(site) else None, num_ranks, axis.transport)


def link_on(machine: Machine | None, num_ranks: int, transport: str = "auto") -> str:
    """Return what connects so many ranks; None: on CPUs."""
    if machine is None:
        return "cpu"
    if num_ranks > machine.ranks_of_host:
        return "network"
    return "p2p" if transport == "p2p" else "symmetric"


def _exposed(sent: int, count: int, shown: int, work: float, kind: str, axis: Ranks) -> float:
    """Return what `count` messages of `sent` bytes add to the work, in seconds: `shown` of them, and what it cannot hide."""
    transfer = sent / axis.machine.bytes_per_second(kind) + LATENCY * count
    waited = transfer * shown / count
    slowdown = SLOWDOWN * transfer if kind in ("p2p", "network") else 0.0
    return waited + max(0.0, transfer - waited - work) + slowdown


def is_gpu(site: AttentionSite) -> bool:
    """Tell whether the attention will run on a GPU; a model without memory is planned for one."""
    return site.device in ("cuda", "meta")
