"""Workload: an attention and its ranks as numbers: what each rank computes, sends and holds, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.attention.heads import Heads, heads_of
from cpcompile.runtime.attention.key_needs import needed
from cpcompile.runtime.schedule import Piece, Visible, by_position, num_tokens, pieces, whole

MOST_RANKS = 32  # of more ranks only the ends and the middle are looked at: one of them is the busiest


@dataclass(frozen=True, slots=True)
class Workload:
    """A whole attention, its ranks, and what the host knows of what is visible.

    Attributes:
        batch, heads, kv_heads, head_dim, value_dim, itemsize: sizes of q, k and v, and bytes of an element.
        length, layout, world_size: the tokens and which of them each rank holds.
        visible: what rows see; documents that nobody has read hide nothing here.
        inner_size: ranks that exchange heads in `usp`; rank r is at (outer r // inner_size, inner r % inner_size).
        heads_per_message: how many key heads a rank receives at once; 0: all.
        keeps_heads: what was received and computed by heads is kept for backward, unless heads are few at once.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    length: int
    layout: str
    world_size: int
    visible: Visible
    inner_size: int = 0
    heads_per_message: int = 0
    keeps_heads: bool = True

    @property
    def keeps_rounds(self) -> bool:
        """Whether what was received and computed by heads is kept; otherwise backward exchanges it once more."""
        return self.keeps_heads and not self.heads_per_message

    def inner(self, strategy: str) -> int:
        """Return how many ranks exchange heads: ring is a grid of one inner rank, Ulysses of one outer rank."""
        return STRATEGIES[strategy].inner_size(self.world_size, self.inner_size)

    def spans(self, rank: int) -> Spans:
        """Return the tokens of a rank."""
        return TokenOrder(self.length, self.world_size, self.layout).spans[rank]

    def rows(self, strategy: str, outer: int) -> Spans:
        """Return the query rows that the ranks at `outer` compute, each for its heads."""
        inner = self.inner(strategy)
        if inner == 1:
            return self.spans(outer)
        return by_position([span for i in range(inner) for span in self.spans(outer * inner + i)])

    def heads_of(self, strategy: str) -> list[Heads]:
        """Return the heads of each inner rank."""
        inner = self.inner(strategy)
        return [heads_of(rank, inner, self.heads, self.kv_heads) for rank in range(inner)]

    @property
    def key_width(self) -> int:
        """Elements of one key head's k and v of one token, over the batch."""
        return self.batch * (self.head_dim + self.value_dim)


def sampled(count: int) -> Sequence[int]:
    """Return the ranks to look at, of so many."""
    return range(count) if count <= MOST_RANKS else sorted({0, 1, count // 2, count - 2, count - 1})


@lru_cache(maxsize=1024)
def pieces_of(workload: Workload, strategy: str, outer: int) -> tuple[Piece, ...]:
    """Return the rectangles that a rank at `outer` computes."""
    rows, count = workload.rows(strategy, outer), workload.world_size // workload.inner(strategy)
    if STRATEGIES[strategy].is_at_once or count == 1:
        return pieces(rows, whole(workload.length), workload.visible)
    columns = [workload.rows(strategy, source) for source in range(count)]
    return tuple(piece for spans in columns for piece in pieces(rows, spans, workload.visible))


def pairs(piece: Piece) -> int:
    """Return how many (query, key) pairs of a rectangle its band lets through."""
    rows, columns = piece.rows.size, piece.columns.size
    hidden = 0 if piece.high is None else _triangle(columns - 1 - piece.high, rows, columns)
    hidden += 0 if piece.low is None else _triangle(piece.low + rows - 1, rows, columns)
    return rows * columns - hidden


def _triangle(largest: int, rows: int, columns: int) -> int:
    """Return the sum of `min(max(largest - i, 0), columns)` over the rows i."""

    def up_to(n: int) -> int:
        return n * (n + 1) // 2 if n > 0 else 0

    return up_to(largest) - up_to(largest - rows) - up_to(largest - columns) + up_to(largest - columns - rows)


@lru_cache(maxsize=1024)
def work_of(workload: Workload, strategy: str, rank: int) -> int:
    """Return how many (query, key) pairs a rank computes, over its heads and the batch."""
    inner = workload.inner(strategy)
    heads = workload.heads_of(strategy)[rank % inner].num_query
    seen = pieces(workload.rows(strategy, rank // inner), whole(workload.length), workload.visible)
    return workload.batch * heads * sum(map(pairs, seen))


@dataclass(frozen=True, slots=True)
class KeyTraffic:
    """What a place of a ring sends and fetches, as numbers of tokens, and of how many others it fetches."""

    sent: int
    fetched: int
    sources: int


@lru_cache(maxsize=1024)
def keys_sent(workload: Workload, strategy: str) -> dict[int, KeyTraffic]:
    """Return for each outer place of a ring, or for some of many, which keys travel."""
    count = workload.world_size // workload.inner(strategy)
    rows = [workload.rows(strategy, outer) for outer in range(count)]

    def fetched(receiver: int, source: int) -> int:
        found = needed(pieces(rows[receiver], rows[source], workload.visible), rows[source])
        return sum(span.size for span in found) if receiver != source else 0

    found = {}
    for outer in sampled(count):
        sizes = [fetched(outer, other) for other in range(count)]
        found[outer] = KeyTraffic(
            sum(fetched(other, outer) for other in range(count)), sum(sizes), sum(map(bool, sizes))
        )
    return found


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that a rank sends, in forward and backward: to those that it exchanges heads with, and as keys."""

    forward_swap: int
    backward_swap: int
    forward_keys: int
    backward_keys: int


@lru_cache(maxsize=1024)
def sent_by_ranks(workload: Workload, strategy: str) -> tuple[Sent, ...]:
    """Return what each rank sends, or some of many.

    Keys and values go to the ranks whose rows see them, in backward once more, and their gradients go back; inner ranks exchange
    q, k, v and the output, in backward their gradients, and those four once more where they were not kept.
    """
    inner, heads, size = workload.inner(strategy), workload.heads_of(strategy), workload.itemsize
    ranks = []
    for outer, keys in keys_sent(workload, strategy).items():
        tokens = [num_tokens(workload.spans(outer * inner + i)) for i in range(inner)]
        swapped = _exchanged(workload, heads, tokens, has_keys=not STRATEGIES[strategy].is_latent)
        for own, (forward, backward) in zip(heads, swapped, strict=True):
            width = size * workload.key_width * num_keys(own)
            ranks.append(Sent(size * forward, size * backward, keys.sent * width, (keys.sent + keys.fetched) * width))
    return tuple(ranks)


def attention_bytes(workload: Workload, strategy: str) -> tuple[int, int]:
    """Return the most bytes that a rank sends, in the forward and in the backward."""
    ranks = sent_by_ranks(workload, strategy)
    return max(r.forward_swap + r.forward_keys for r in ranks), max(r.backward_swap + r.backward_keys for r in ranks)


def num_keys(heads: Heads) -> int:
    """Return how many key heads travel for these heads: one for each query head where a kernel cannot share them."""
    return heads.num_query if heads.key_index() else heads.num_key


def _exchanged(
    workload: Workload, heads: Sequence[Heads], tokens: Sequence[int], has_keys: bool = True
) -> list[tuple[int, int]]:
    """Return the elements that each inner rank sends of its `tokens` and heads to the other inner ranks."""
    keys = workload.key_width if has_keys else 0
    given = [workload.batch * h.num_query * workload.head_dim + keys * h.num_key for h in heads]
    results = [workload.batch * h.num_query * workload.value_dim for h in heads]

    def sent(own: list[int], back: list[int], i: int) -> int:
        return tokens[i] * (sum(own) - own[i]) + (sum(tokens) - tokens[i]) * back[i]

    again = [0] * len(heads) if workload.keeps_rounds else [a + b for a, b in zip(given, results, strict=True)]
    none = [0] * len(heads)
    return [(sent(given, results, i), sent(results, given, i) + sent(again, none, i)) for i in range(len(heads))]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one attention on a rank: kept from forward to backward, and received from other ranks and held at once."""

    kept: int
    received: int


@lru_cache(maxsize=1024)
def memory_of(workload: Workload, strategy: str) -> Memory:
    """Return the memory of the rank that needs most.

    Every strategy keeps q, k, v and out of the local tokens. Those that exchange heads keep them by heads, and out of the local
    tokens; or they keep the local ones, and receive them by heads in forward and in backward, those of two rounds at once. A
    ring holds the block that it computes and the one that arrives; `gather` holds all keys that its rows see, of as many heads as
    a message has; `latent` holds the keys of all tokens, `latent_heads` those of its heads, and neither keeps them.
    """
    known, inner, size = STRATEGIES[strategy], workload.inner(strategy), workload.itemsize
    query = size * workload.batch * workload.heads * (workload.head_dim + workload.value_dim)
    keys = size * workload.kv_heads * workload.key_width
    by_heads = query if known.is_latent else query + keys
    slots = max(num_tokens(workload.spans(rank)) for rank in sampled(workload.world_size))
    kept = slots * (by_heads + 4 * workload.batch * workload.heads)
    received = 0
    if inner > 1 and workload.keeps_rounds:
        kept += slots * size * workload.batch * workload.heads * workload.value_dim
    elif inner > 1:
        received = int(slots * by_heads * _at_once(workload, max(h.num_key for h in workload.heads_of(strategy))))
    count = workload.world_size // inner
    if known.is_latent:
        return Memory(kept, received + workload.length * keys // inner)
    if count == 1:
        return Memory(kept, received)
    width = size * workload.key_width * max(map(num_keys, workload.heads_of(strategy)))
    if known.is_at_once:
        fetched = max(keys.fetched for keys in keys_sent(workload, strategy).values())
        return Memory(kept, int(fetched * width * _at_once(workload, workload.kv_heads)))
    block = max(num_tokens(workload.rows(strategy, outer)) for outer in sampled(count))
    return Memory(kept, received + min(2, count - 1) * block * width)


def _at_once(workload: Workload, num_heads: int) -> float:
    """Return the share of so many key heads of a rank that is there at once: that of two messages."""
    return min(1.0, 2 * workload.heads_per_message / num_heads) if workload.heads_per_message else 1.0


def workload_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    length: int,
    layout: str,
    world_size: int,
    visible: Visible,
    inner_size: int = 0,
    heads_per_message: int = 0,
    keeps_heads: bool = True,
) -> Workload:
    """Return the workload of tensors `[B, heads, any tokens, D]`; they may be fake, sizes must be known."""
    return Workload(
        batch=int(q.shape[0]),
        heads=int(q.shape[1]),
        kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[3]),
        value_dim=int(v.shape[3]),
        itemsize=q.element_size(),
        length=int(length),
        layout=layout,
        world_size=world_size,
        visible=visible,
        inner_size=inner_size,
        heads_per_message=heads_per_message,
        keeps_heads=keeps_heads,
    )
