"""Strategies: the attention operators of a rewritten graph, one for each way in which ranks share the work.

All take local q, k and v `[B, heads, local tokens, D]`, padding slots included, and return (out, lse, *kept), out of the local
rows; `latent` takes k and v of all tokens, `latent_heads` those of this rank's heads. lse is of the local rows, or of this rank's
heads and all rows where heads are exchanged. Rows of a mask are the local ones, except
for strategies that exchange heads, which take it whole; all else in `AttentionArguments` is of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from cpcompile.balance.layout import local_length
from cpcompile.balance.token_order import TokenOrder
from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention import gather, latent, latent_heads, registration, ring, ulysses
from cpcompile.runtime.attention.arguments import NAMES, AttentionArguments
from cpcompile.runtime.attention.heads import NUM_ROUNDS, most_rounds, rounds, storage
from cpcompile.runtime.attention.partial_results import empty_result
from cpcompile.runtime.kernels.merge import accumulation_dtype
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor
BOUNDS = NAMES.index("bounds")
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class AxisArguments:
    """The keyword arguments of an attention operator.

    Attributes:
        length: tokens of the whole sequence.
        layout: which tokens each rank holds.
        world_size, group: the ranks of the axis, and the name of their process group.
        heads_per_message: how many key heads a rank receives at once; 0: all.
        keeps_heads: what was received and computed by heads is kept for backward, unless heads are few at once.
        inner_size: how many ranks exchange heads; rank r is at (outer r // inner_size, inner r % inner_size).
        inner_group, outer_group: the process groups that this rank is in along both.
        bounds: where documents begin, for a layout that follows them: an argument of the terms.
    """

    length: int
    layout: str
    world_size: int
    group: str
    heads_per_message: int = 0
    keeps_heads: bool = True
    inner_size: int = 0
    inner_group: str = ""
    outer_group: str = ""
    bounds: Tensor | None = None

    @classmethod
    def of(cls, values: Sequence[Any], axis: Mapping[str, Any]) -> AxisArguments:
        """Return the axis of an operator's arguments: the values of the terms, and its keyword arguments."""
        return cls(**axis, bounds=values[BOUNDS] if len(values) > BOUNDS else None)

    @property
    def order(self) -> TokenOrder:
        """The tokens of all ranks."""
        return TokenOrder.of(self.length, self.world_size, self.layout, self.bounds)

    @property
    def spans(self) -> tuple[Spans, ...]:
        """The tokens of each rank."""
        return self.order.spans

    @property
    def ring(self) -> Ring:
        """All ranks."""
        return Ring.of(self.group, self.world_size)

    @property
    def room(self) -> int:
        """The slots for the tokens of the ranks that exchange heads."""
        if self.inner_size == self.world_size:
            return self.length
        return self.inner_size * local_length(self.length, self.world_size, self.layout)

    @property
    def grid(self) -> ulysses.Grid:
        """The ranks as a grid."""
        size = self.inner_size
        inner, outer = Ring.of(self.inner_group, size), Ring.of(self.outer_group, self.world_size // size)
        return _grid_of(
            self.order, inner, outer, self.room, self.most_rounds, self.heads_per_message, self.keeps_rounds
        )

    @property
    def keeps_rounds(self) -> bool:
        """Whether what was received and computed by heads is kept."""
        return keeps_rounds({"keeps_heads": self.keeps_heads, "heads_per_message": self.heads_per_message})

    @property
    def most_rounds(self) -> int:
        """In how many rounds heads are exchanged."""
        return most_rounds(self.layout, is_ring=self.inner_size < self.world_size)


def keeps_rounds(axis: Mapping[str, Any]) -> bool:
    """Tell by the keyword arguments of an operator whether what it received and computed by heads is kept."""
    return axis.get("keeps_heads", True) and not axis.get("heads_per_message", 0)


@lru_cache(maxsize=256)
def _grid_of(
    order: TokenOrder, inner: Ring, outer: Ring, room: int, most_rounds: int, at_once: int, keeps_heads: bool
) -> ulysses.Grid:
    spans = order.spans
    rows = tuple(spans[start : start + inner.size] for start in range(0, order.world_size, inner.size))
    return ulysses.Grid(inner, outer, rows, room, most_rounds, at_once, keeps_heads)


def _results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v)


def _ring(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, Tensor]:
    at = AxisArguments.of(values, axis)
    terms = AttentionArguments.of(q, k, values, at.length)
    ring.refuse_bias(terms)
    return ring.attend(q, k, v, terms, at.spans, at.ring)


def _ring_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: object, *values: Any, **axis: Any
) -> Gradients:
    at = AxisArguments.of(values, axis)
    return ring.attend_backward(
        dout, q, k, v, out, lse, AttentionArguments.of(q, k, values, at.length), at.spans, at.ring
    )


def _gather(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, Tensor]:
    at = AxisArguments.of(values, axis)
    return gather.attend(
        q, k, v, AttentionArguments.of(q, k, values, at.length), at.spans, at.ring, at.heads_per_message
    )


def _gather_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: object, *values: Any, **axis: Any
) -> Gradients:
    at = AxisArguments.of(values, axis)
    terms = AttentionArguments.of(q, k, values, at.length)
    return gather.attend_backward(dout, q, k, v, out, lse, terms, at.spans, at.ring, at.heads_per_message)


def _latent(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, Tensor]:
    at = AxisArguments.of(values, axis)
    return latent.attend(q, k, v, AttentionArguments.of(q, k, values, at.length), at.spans[at.ring.rank])


def _latent_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, kept: object, *values: Any, **axis: Any
) -> Gradients:
    at = AxisArguments.of(values, axis)
    terms = AttentionArguments.of(q, k, values, at.length)
    return latent.attend_backward(dout, q, k, v, out, lse, terms, at.spans[at.ring.rank])


def _latent_heads(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    at = AxisArguments.of(values, _as_grid(axis))
    out, lse, kept = latent_heads.attend(q, k, v, AttentionArguments.of(q, k, values, at.length), at.grid)
    return _with_kept(out, lse, kept, LATENT_HEADS)


def _latent_heads_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    *values: Any,
    **axis: Any,
) -> Gradients:
    at = AxisArguments.of(values, _as_grid(axis))
    terms = AttentionArguments.of(q, k, values, at.length)
    each = _of_rounds(kept, LATENT_HEADS)
    return latent_heads.attend_backward(dout, q, k, v, out, lse, each, terms, at.grid)  # type: ignore[arg-type]


def _latent_heads_results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    at = AxisArguments(**axis)
    num_query, kept = q.shape[1] // at.world_size, []
    if at.keeps_rounds:
        for ranks in latent_heads.rounds_of(q, k, at.world_size, at_once=0):
            q_own = q.new_empty(q.shape[0], at.length, ranks[0].num_query, q.shape[3]).transpose(1, 2)
            kept.append((q_own, empty_result(q_own, v)[0]))
    return _with_kept(empty_result(q, v)[0], _statistics(q, num_query, at.length), kept, LATENT_HEADS)


def _statistics(q: Tensor, num_heads: int, num_tokens: int) -> Tensor:
    """Return the lse of so many heads and tokens, without values."""
    return q.new_empty(q.shape[0], num_heads, num_tokens, dtype=accumulation_dtype(q.dtype))


def _with_kept(
    out: Tensor, lse: Tensor, kept: Sequence[tuple[Tensor, ...]], of: registration.Kept
) -> tuple[Tensor, ...]:
    """Return the results of an operator: what no round keeps is empty."""
    tensors = [x for each in kept for x in each]
    return out, lse, *tensors, *(lse.new_empty(0) for _ in range(of.count - len(tensors)))


def _of_rounds(kept: Sequence[Tensor], of: registration.Kept) -> list[tuple[Tensor, ...]]:
    """Return what each round kept."""
    size = len(of.replaces)
    return [tuple(kept[i : i + size]) for i in range(0, len(kept), size) if kept[i].numel()]


def _in_grid(terms: AttentionArguments, grid: ulysses.Grid) -> AttentionArguments:
    """Return the terms with the rows of the mask that the inner ranks of this one hold."""
    mask = terms.mask
    if mask is None or mask.shape[2] == 1 or grid.outer.size == 1:
        return terms
    rows = torch.cat([mask[:, :, span.positions] for span in grid.rows[grid.outer.rank]], 2)
    return replace(terms, mask=rows)


def _usp(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    at = AxisArguments.of(values, axis)
    grid = at.grid
    terms = _in_grid(AttentionArguments.of(q, k, values, at.length), grid)
    if at.inner_size < at.world_size:
        ring.refuse_bias(terms)
    return _with_kept(*ulysses.attend(q, k, v, terms, grid), BY_HEADS)


def _usp_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    *values: Any,
    **axis: Any,
) -> Gradients:
    at = AxisArguments.of(values, axis)
    grid = at.grid
    terms = _in_grid(AttentionArguments.of(q, k, values, at.length), grid)
    each = _of_rounds(kept, BY_HEADS)
    return ulysses.attend_backward(dout, q, k, v, out, lse, each, terms, grid)  # type: ignore[arg-type]


def _usp_results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    at = AxisArguments(**axis)
    # All ranks run the graph that one of them traced: sizes do not depend on the rank.
    most_query, most_key = storage(at.inner_size, q.shape[1], k.shape[1])
    count = len(rounds(at.inner_size, q.shape[1], k.shape[1], at.most_rounds)) if at.keeps_rounds else 0

    def stored(x: Tensor, heads: int, dim: int) -> Tensor:
        return x.new_empty(x.shape[0], at.room, heads // count, dim).transpose(1, 2)

    of_query, of_key = [(q, most_query, q.shape[3])], [(x, most_key, x.shape[3]) for x in (k, v)]
    kept = [tuple(stored(*each) for each in (*of_query, *of_key, (q, most_query, v.shape[3]))) for _ in range(count)]
    return _with_kept(empty_result(q, v)[0], _statistics(q, most_query, at.room), kept, BY_HEADS)


def _as_grid(axis: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of USP whose inner ranks are all ranks."""
    return axis | {"inner_size": axis["world_size"], "inner_group": axis["group"], "outer_group": ""}


def _ulysses(*arguments: Any, **axis: Any) -> tuple[Tensor, ...]:
    return _usp(*arguments, **_as_grid(axis))


def _ulysses_backward(*arguments: Any, **axis: Any) -> Gradients:
    return _usp_backward(*arguments, **_as_grid(axis))


def _ulysses_results(*arguments: Any, **axis: Any) -> tuple[Tensor, ...]:
    return _usp_results(*arguments, **_as_grid(axis))


# What each round keeps of ulysses and usp, and of latent_heads, whose k and v are those of its heads already.
BY_HEADS = registration.Kept(4 * NUM_ROUNDS, ("q", "k", "v", "out"), keeps_rounds)
LATENT_HEADS = registration.Kept(2 * NUM_ROUNDS, ("q", "out"), keeps_rounds)
AXIS = "SymInt length, str layout, int world_size, str group"
MESSAGES = f"{AXIS}, int heads_per_message=0"
HEADS = f"{MESSAGES}, bool keeps_heads=True"
GRID = f"{AXIS}, int inner_size, str inner_group, str outer_group, int heads_per_message=0, bool keeps_heads=True"

registration.define("ring_attention", _ring, _ring_backward, _results, AXIS)
registration.define("gather_attention", _gather, _gather_backward, _results, MESSAGES)
# The same with a name of its own: only the tokens within reach of a window travel.
registration.define("halo_attention", _gather, _gather_backward, _results, MESSAGES)
# Its k and v are whole, in the user's order.
registration.define("latent_attention", _latent, _latent_backward, _results, AXIS, sends=False)
# Its k and v are of all tokens too, and of this rank's heads.
registration.define(
    "latent_heads_attention", _latent_heads, _latent_heads_backward, _latent_heads_results, HEADS, LATENT_HEADS
)
registration.define("ulysses_attention", _ulysses, _ulysses_backward, _ulysses_results, HEADS, BY_HEADS)
registration.define("usp_attention", _usp, _usp_backward, _usp_results, GRID, BY_HEADS)
