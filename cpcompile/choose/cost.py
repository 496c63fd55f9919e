"""Cost model: what each strategy and layout costs an attention, in estimated seconds of the slowest rank, forward and backward.

Work is the (query, key) pairs of a rank at the rate of its kernel; traffic is the bytes that it sends, exactly, at the rate of
its links. A ring hides its messages behind its work but for the last one, `gather` and the exchange of heads all but the first
or last of each kind. No attention is done before its host has launched it. Packed documents, which nobody has read yet, are
taken for one; ranks that compute rows of their own may then have unequal work, ranks that compute heads have not. `explain`
prints the estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS, follows_documents, group_size, of_groups
from cpcompile.runtime.attention.heads import most_rounds, rounds
from cpcompile.runtime.attention.workload import Workload, keys_sent, pairs, pieces_of, sampled, sent_by_ranks
from cpcompile.runtime.schedule import Band, Piece, Visible

# Measured on H100 in bf16: FLOP/s of forward and backward for a whole causal attention of 64k tokens, 32 heads of 128.
RATES = {
    "cudnn": (620e12, 560e12),
    "cudnn_varlen": (590e12, 530e12),
    "flash3": (620e12, 560e12),
    "flash4": (620e12, 560e12),
    "triton": (440e12, 375e12),
}
FLASH2 = (330e12, 300e12)  # and all others that run on GPUs
CPU = (100e9, 100e9)  # fp32 on a few cores
# A kernel reaches its rate when a row sees so many keys, as in a causal square of 16k; with half as many it is 7 and 11% slower
# alone, and half of that where blocks run side by side.
FULL_KEYS, FORWARD_SLOPE, BACKWARD_SLOPE = 8192, 0.05, 0.08

# Bytes a second and direction; between hosts those of a 400 Gb/s card for each GPU.
BYTES = {"symmetric": 350e9, "p2p": 250e9, "network": 45e9, "cpu": 2e9}
RANKS_OF_HOST = 8  # that NVLink connects; messages of more ranks take the network
# A latent: dense products, and passes over memory, of an H100 in bf16; not measured here, but the usual share of its peaks.
PRODUCTS, MEMORY = {"gpu": 600e12, "cpu": 100e9}, {"gpu": 2.5e12, "cpu": 10e9}
# Each rank holds whole keys and values of a layer, and twice to three times that of their gradients: `auto` takes no more bytes.
MOST_HELD = 4 * 2**30
# Bytes a second of the keys and values that a rank gathers, its own included: copied, their gradients summed in float32 and sent
# home. Two GPUs, 16k to 128k tokens and a window: 80 to 120e9.
GATHERING = 100e9
LAYING = 300e9  # bytes a second at which heads are laid into messages and out of them, which nothing hides
SLOWDOWN = 0.1  # of kernels while messages are sent that take SMs; symmetric memory takes none
LATENCY = 25e-6  # seconds of an exchange: launches and barriers
# Seconds that the host of a GPU takes to launch an attention and its gradient: at least, for each rank whose keys it computes
# with, and for each that heads are exchanged with. A layout that follows documents has many runs. `one_rank.py`, 2 to 8 ranks.
HOST = {
    "ring": (0.0, 1.75e-3, 0.0),
    "gather": (4e-3, 0.8e-3, 0.0),
    "halo": (4e-3, 0.3e-3, 0.0),
    "ulysses": (5.5e-3, 0.0, 0.1e-3),
    "usp": (0.0, 2.7e-3, 2.3e-3),
}
HOST_OF_DOCUMENTS = HOST | {"ring": (2e-3, 1.7e-3, 0.0), "gather": (5e-3, 0.6e-3, 0.0), "usp": (3e-3, 2.6e-3, 0.0)}
# Documents: the work of the slowest rank over the mean, where each computes rows and the layout does not follow documents. 16
# documents of 64k tokens on 2 and 8 GPUs: 1.2 to 2.9.
UNEVEN = 1.3
# By how much kernels are slower on packed documents than on one: where a rank computes some rows of each, which leaves backward
# short runs of them, and where it computes some heads of whole documents, which are too few to fill a GPU unless one call takes
# many. `one_rank.py`, 5 and 16 documents on 2, 4 and 8 ranks: 1.2 to 1.9, and 1.1 to 1.25, for cuDNN of variable lengths; two
# GPUs for the others.
PACKED = {"cudnn_varlen": (1.35, 1.15)}
PACKED_ELSEWHERE = (1.0, 1.6)

# Of strategies within this factor of the cheapest, the first of these is taken: the one that sends least, then those whose work
# does not depend on the mask.
CLOSE = 1.03
PREFERENCE = ("halo", "ulysses", "usp", "ring", "gather", "latent_heads", "latent")


@dataclass(frozen=True, slots=True)
class Expansion:
    """Keys and values that are computed from a narrower value, in numbers for each token of the batch.

    Attributes:
        latent_bytes, key_bytes: of the value, and of keys and values.
        flops: what computes these from that.
        messages: into how many values it is split.
        by_heads: some heads of them can be computed without the others.
    """

    latent_bytes: int
    key_bytes: int
    flops: int
    messages: int = 1
    by_heads: bool = False


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why a strategy cannot compute an attention, and what to do about it."""

    reason: str
    remedy: str


NO_GRID = Obstacle("the ranks are no grid of two axes", "Name a pair of axes of the mesh")
HIDDEN_ROWS = Obstacle(
    "its additive mask may hide every key of a row, which partial results do not keep exactly", "Mask with booleans"
)
NO_WINDOW = Obstacle(
    "it has no window that bounds both sides, so that its rows see more than the tokens of neighbours", "Give it one"
)


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
    lookahead: int = -1
    has_documents: bool = False
    kernel: str = "cudnn"
    latent: Expansion | None = None

    @property
    def has_window(self) -> bool:
        """Whether keys on either side are out of sight, so that only neighbours' tokens are needed."""
        return self.window > 0 and (self.is_causal or self.lookahead >= 0)

    def strategies(self, axis: Ranks) -> tuple[str, ...]:
        """Return the strategies that are exact here, and of use."""
        return tuple(name for name in PREFERENCE if self.expands(name, axis) and self.obstacle(name, axis) is None)

    def obstacle(self, strategy: str, axis: Ranks) -> Obstacle | None:
        """Return why the ranks, the mask or the window do not let a strategy be exact, or as it promises; None where they do.

        An additive mask may hide every key with a finite bias; such rows average over all keys, which merging blocks cannot keep
        exactly.
        """
        is_merged = strategy == "ring" or (strategy == "usp" and axis.inner_size < axis.world_size)
        if strategy == "usp" and not axis.inner_size:
            return NO_GRID
        if is_merged and self.is_additive:
            return HIDDEN_ROWS
        if strategy == "halo" and not self.has_window:
            return NO_WINDOW
        return None

    def expands(self, strategy: str, axis: Ranks) -> bool:
        """Tell whether there is a latent, where the strategy needs one, that the ranks can expand."""
        if strategy == "latent":
            return self.latent is not None
        if strategy == "latent_heads":
            divides = self.heads % axis.world_size == self.kv_heads % axis.world_size == 0
            return self.latent is not None and self.latent.by_heads and divides
        return True

    def fits(self, strategy: str, axis: Ranks) -> bool:
        """Tell whether a strategy may be taken without being asked for: a latent that is clearly narrower, of keys that fit."""
        if self.latent is None or not strategy.startswith("latent"):
            return True
        held = self.latent.key_bytes * self.tokens // (axis.world_size if strategy == "latent_heads" else 1)
        return 2 * self.latent.latent_bytes < self.latent.key_bytes and held <= MOST_HELD

    def problem(self, axis: Ranks, layout: str) -> Workload:
        """Return the attention on ranks, as numbers."""
        high = 0 if self.is_causal else None if self.lookahead < 0 else self.lookahead
        visible = Visible(Band(1 - self.window if self.window else None, high))
        return Workload(
            batch=self.batch,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            itemsize=self.bytes_per_element,
            length=self.tokens,
            layout=layout,
            world_size=axis.world_size,
            visible=visible,
            inner_size=axis.inner_size,
        )


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks that share a sequence, and how they exchange messages.

    Attributes:
        world_size: all of them.
        inner_size: those that exchange heads in `usp`; 0 where they are no grid.
        heads_per_message: key heads that `gather` and `halo` gather at once; 0: all.
        transport: `symmetric` or `p2p`, or `auto`, which is taken for symmetric on one host.
    """

    world_size: int
    inner_size: int = 0
    heads_per_message: int = 0
    transport: str = "auto"


@lru_cache(maxsize=1024)
def seconds(site: Attention, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the estimated seconds of one attention, forward and backward, on the slowest rank."""
    return max(device_seconds(site, strategy, layout, axis), host_seconds(site, strategy, layout, axis))


def device_seconds(site: Attention, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the seconds of the slowest rank whose host is ahead: of its kernels, and of messages that these do not hide."""
    problem = site.problem(axis, layout)
    work = compute_seconds(site, problem, strategy)
    inner = problem.inner(strategy)
    if strategy.startswith("latent"):
        work += expansion_seconds(site, axis, parts=inner)
    if strategy == "latent":
        return work
    ranks = sent_by_ranks(problem, strategy)
    keys = max(r.forward_keys + r.backward_keys for r in ranks)
    swapped = max(r.forward_swap + r.backward_swap for r in ranks)
    total = work
    if keys:
        hops = max(ring.sources for ring in keys_sent(problem, strategy).values())
        messages = 3 * (math.ceil(site.kv_heads / axis.heads_per_message) if axis.heads_per_message else 1)
        # Keys twice and their gradients: a ring waits for one message of them all, `gather` for the first of each kind.
        count, shown = (messages, 3) if strategy in ("gather", "halo") else (3 * hops, 1)
        total += _exposed(keys, count, shown, work, link(site, axis, axis.world_size))
        if strategy in ("gather", "halo") and is_gpu(site):
            own = problem.key_width * problem.itemsize * site.kv_heads * site.tokens // axis.world_size
            total += (own + max(r.forward_keys for r in ranks)) / GATHERING
    if swapped:
        most = most_rounds(layout, is_ring=inner < axis.world_size)
        count = 4 * len(rounds(inner, site.heads, site.kv_heads, most))
        total += _exposed(swapped, count, 4, work, link(site, axis, inner))
        total += swapped / LAYING if is_gpu(site) else 0.0
    return total


def host_seconds(site: Attention, strategy: str, layout: str, axis: Ranks) -> float:
    """Return the seconds that the host takes to launch an attention and its gradient on a GPU; on a CPU it computes itself."""
    if not is_gpu(site) or strategy not in HOST or axis.world_size == 1:
        return 0.0
    problem = site.problem(axis, layout)
    inner = problem.inner(strategy)
    hops = max(ring.sources for ring in keys_sent(problem, strategy).values())
    least, of_keys, of_heads = (HOST_OF_DOCUMENTS if _deals_evenly(layout, inner) else HOST)[strategy]
    return least + of_keys * (1 + hops) + of_heads * inner


def compute_seconds(site: Attention, problem: Workload, strategy: str) -> float:
    """Return the seconds of the kernels of the slowest rank."""
    rates = RATES.get(site.kernel, FLASH2) if is_gpu(site) else CPU
    inner = problem.inner(strategy)
    heads = site.batch * max(h.num_query for h in problem.heads_of(strategy))
    per_pair = 2.0 * (site.head_dim + site.value_dim) * heads

    def of(piece: Piece) -> float:
        count = pairs(piece)
        size = min(1.0, count / piece.rows.size / FULL_KEYS)
        forward, backward = rates[0] * size**FORWARD_SLOPE, rates[1] * size**BACKWARD_SLOPE
        return per_pair * count * (1 / forward + 2.5 / backward) if count else 0.0  # five products against two

    whole = max(sum(map(of, pieces_of(problem, strategy, at))) for at in sampled(problem.world_size // inner))
    return whole * _of_documents(site, problem, inner)


def _of_documents(site: Attention, problem: Workload, inner: int) -> float:
    """Return by how much packed documents take longer than one of the same area; `inner` ranks compute heads of the same rows."""
    if not site.has_documents:
        return 1.0
    of_rows, of_heads = PACKED.get(site.kernel, PACKED_ELSEWHERE)
    if inner == 1:
        of_heads = 1.0
    if inner == problem.world_size:
        return of_heads
    return max(of_heads, of_rows) * (1.0 if _deals_evenly(problem.layout, inner) else UNEVEN)


def _deals_evenly(layout: str, inner: int) -> bool:
    """Tell whether the layout gives equal work of documents to ranks, or to the groups of `inner` that compute the same rows."""
    return follows_documents(layout) and group_size(layout) in (1, inner)


def expansion_seconds(site: Attention, axis: Ranks, parts: int = 1) -> float:
    """Return the seconds by which a latent costs more than the work of the attention; nothing of it is hidden.

    Keys and values of all tokens are computed in forward and again in backward, whose two products take twice as long; other
    strategies do this once, for the tokens of a rank. Each time they are written and read. `parts`: how many ranks share it.
    """
    assert site.latent is not None
    device, num_ranks = "gpu" if is_gpu(site) else "cpu", axis.world_size
    products = site.latent.flops * (4 / parts - 3 / num_ranks) / PRODUCTS[device]
    memory = site.latent.key_bytes * 2 * (3 / parts - 2 / num_ranks) / MEMORY[device]
    kind = link(site, axis, num_ranks)
    sent = 2 * site.latent.latent_bytes * (num_ranks - 1) / num_ranks
    travel = sent / BYTES["p2p" if kind == "symmetric" else kind]
    return site.tokens * (products + memory + travel) + 2 * site.latent.messages * LATENCY


def link(site: Attention, axis: Ranks, num_ranks: int) -> str:
    """Return what connects so many ranks, a key of `BYTES`."""
    if not is_gpu(site):
        return "cpu"
    if num_ranks > RANKS_OF_HOST:
        return "network"
    return "p2p" if axis.transport == "p2p" else "symmetric"


def _exposed(sent: int, count: int, shown: int, work: float, kind: str) -> float:
    """Return what `count` messages of `sent` bytes add to the work, in seconds: `shown` of them, and what it cannot hide."""
    transfer = sent / BYTES[kind] + LATENCY * count
    waited = transfer * shown / count
    slowdown = SLOWDOWN * transfer if kind in ("p2p", "network") else 0.0
    return waited + max(0.0, transfer - waited - work) + slowdown


def is_gpu(site: Attention) -> bool:
    """Tell whether the attention will run on a GPU; a model without memory is planned for one."""
    return site.device in ("cuda", "meta")


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout, the strategy of each attention, and the estimates that led to them."""

    layout: str
    strategies: tuple[str, ...]
    estimates: dict[tuple[str, str], float]


def choose(sites: list[Attention], strategy: str, balancer: str, axis: Ranks, *, follow: bool = True) -> Choice:
    """Choose what costs least among what was asked for; `auto` leaves all open. One layout serves all attentions.

    Layouts that follow documents are for those who have some, and only `auto` with `follow` takes one by itself.
    """
    layouts = _layouts(strategy, balancer, axis, follow=follow and any(site.has_documents for site in sites))
    best: tuple[float, Choice] | None = None
    estimates: dict[tuple[str, str], float] = {}
    for layout in layouts:
        chosen, total = [], 0.0
        for site in sites:
            allowed = [s for s in site.strategies(axis) if strategy == s or (strategy == "auto" and site.fits(s, axis))]
            allowed = allowed or ["gather"]
            costs = {name: seconds(site, name, layout, axis) for name in allowed}
            least = min(costs.values())
            name = next(name for name in allowed if costs[name] <= CLOSE * least)
            chosen.append(name)
            total += costs[name]
            for key, cost in costs.items():
                estimates[layout, key] = estimates.get((layout, key), 0.0) + cost
        if best is None or total < best[0]:
            best = total, Choice(layout, tuple(chosen), estimates)
    assert best is not None
    return best[1]


def _layouts(strategy: str, balancer: str, axis: Ranks, *, follow: bool) -> tuple[str, ...]:
    """Return the layouts to choose among. Where heads are exchanged in groups, documents are dealt to these."""
    names = (balancer,) if balancer != "auto" else (*LAYOUTS, "balanced") if follow else LAYOUTS
    followers = [name for name in names if name in DOCUMENT_LAYOUTS and axis.inner_size > 1]
    dealt = {name: of_groups(name, axis.inner_size) for name in followers}
    if strategy == "usp":
        return tuple(dealt.get(name, name) for name in names)
    if strategy == balancer == "auto":  # of equals the first is taken
        return (*(name for name in names if name not in dealt), *dealt.values(), *dealt)
    return names
