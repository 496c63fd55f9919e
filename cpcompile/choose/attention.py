"""Attention: what the cost of an attention depends on, and which strategies can compute it on some ranks."""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.choose.machine import H100, Machine
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.workload import Workload
from cpcompile.runtime.schedule import Band, Visible

# Each rank holds whole keys and values of a layer, and twice to three times that of their gradients: `auto` takes no more bytes.
MOST_HELD = 4 * 2**30


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
class Ranks:
    """The ranks that share a sequence, and how they exchange messages.

    Attributes:
        world_size: all of them.
        inner_size: those that exchange heads in `usp`; 0 where they are no grid.
        heads_per_message: key heads that a rank receives at once; 0: all.
        transport: `symmetric` or `p2p`, or `auto`, which is taken for symmetric on one host.
        machine: what they run on.
    """

    world_size: int
    inner_size: int = 0
    heads_per_message: int = 0
    transport: str = "auto"
    machine: Machine = H100


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """What the cost of an attention depends on. Sizes are those of the whole attention.

    `keeps_heads`: what was exchanged by heads is kept for backward, which exchanges it once more otherwise, as in an activation
    checkpoint that keeps the result. `runs_again`: its forward is part of backward, as where the result is not kept either.
    """

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
    keeps_heads: bool = True
    runs_again: bool = False

    @property
    def has_window(self) -> bool:
        """Whether keys on either side are out of sight, so that only neighbours' tokens are needed."""
        return self.window > 0 and (self.is_causal or self.lookahead >= 0)

    def strategies(self, axis: Ranks) -> tuple[str, ...]:
        """Return the strategies that are exact here, and of use."""
        return tuple(name for name in STRATEGIES if self.expands(name, axis) and self.obstacle(name, axis) is None)

    def obstacle(self, strategy: str, axis: Ranks) -> Obstacle | None:
        """Return why the ranks, the mask or the window do not let a strategy be exact, or as it promises; None where they do.

        An additive mask may hide every key with a finite bias; such rows average over all keys, which merging blocks cannot keep
        exactly.
        """
        known = STRATEGIES[strategy]
        if known.exchange == "inner" and not axis.inner_size:
            return NO_GRID
        merges_all = known.exchange == "inner" and axis.inner_size < axis.world_size
        is_merged = not known.is_at_once and (not known.exchange or merges_all)
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
        if self.latent is None or not STRATEGIES[strategy].is_latent:
            return True
        held = self.latent.key_bytes * self.tokens // (axis.world_size if strategy == "latent_heads" else 1)
        return 2 * self.latent.latent_bytes < self.latent.key_bytes and held <= MOST_HELD

    def workload(self, axis: Ranks, layout: str) -> Workload:
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
            heads_per_message=axis.heads_per_message,
            keeps_heads=self.keeps_heads,
        )
