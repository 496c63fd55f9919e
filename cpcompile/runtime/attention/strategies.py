"""Strategies: the attention operators of a rewritten graph, one for each way in which ranks share the work.

All take local q, k and v `[B, heads, local tokens, D]`, padding slots included, and return (out, lse, *kept) of the local
rows; `latent` takes k and v of all tokens, `latent_heads` those of this rank's heads. Rows of a mask are the local ones, except
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
        heads_per_message: how many key heads are gathered at once; 0: all.
        inner_size: how many ranks exchange heads; rank r is at (outer r // inner_size, inner r % inner_size).
        inner_group, outer_group: the process groups that this rank is in along both.
        bounds: where documents begin, for a layout that follows them: an argument of the terms.
    """

    length: int
    layout: str
    world_size: int
    group: str
    heads_per_message: int = 0
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
        return _grid_of(self.order, inner, outer, self.room, self.most_rounds)

    @property
    def most_rounds(self) -> int:
        """In how many rounds heads are exchanged."""
        return most_rounds(self.layout, is_ring=self.inner_size < self.world_size)


@lru_cache(maxsize=256)
def _grid_of(order: TokenOrder, inner: Ring, outer: Ring, room: int, most_rounds: int) -> ulysses.Grid:
    spans = order.spans
    rows = tuple(spans[start : start + inner.size] for start in range(0, order.world_size, inner.size))
    return ulysses.Grid(inner, outer, rows, room, most_rounds)


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
    out, kept = latent_heads.attend(q, k, v, AttentionArguments.of(q, k, values, at.length), at.grid)
    none = [q.new_empty(0) for _ in range(3 * (NUM_ROUNDS - len(kept)))]
    return out, *(x for each in kept for x in each), *none


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
    stored = [lse, *kept]
    each = [(stored[i], stored[i + 1], stored[i + 2]) for i in range(0, len(stored), 3) if stored[i].numel()]
    return latent_heads.attend_backward(dout, q, k, v, each, AttentionArguments.of(q, k, values, at.length), at.grid)


def _latent_heads_results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    each, results = latent_heads.rounds_of(q, k, axis["world_size"]), [empty_result(q, v)[0]]
    for ranks in each:
        shape = q.shape[0], axis["length"], ranks[0].num_query
        q_own = q.new_empty(*shape, q.shape[3]).transpose(1, 2)
        out_own, lse = empty_result(q_own, v)
        results += [lse, q_own, out_own]
    return *results, *(q.new_empty(0) for _ in range(3 * (NUM_ROUNDS - len(each))))


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
    out, kept = ulysses.attend(q, k, v, terms, grid)
    none = [q.new_empty(0) for _ in range(NUM_KEPT * (NUM_ROUNDS - len(kept)))]
    return out, *(x for each in kept for x in each), *none


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
    stored = [lse, *kept]
    each = [tuple(stored[i : i + NUM_KEPT]) for i in range(0, len(stored), NUM_KEPT) if stored[i].numel()]
    return ulysses.attend_backward(dout, q, k, v, each, terms, grid)  # type: ignore[arg-type]


def _usp_results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, ...]:
    at = AxisArguments(**axis)
    # All ranks run the graph that one of them traced: sizes do not depend on the rank.
    count = len(rounds(at.inner_size, q.shape[1], k.shape[1], at.most_rounds))
    num_query, num_key = (room // count for room in storage(at.inner_size, q.shape[1], k.shape[1]))

    def stored(x: Tensor, heads: int, dim: int) -> Tensor:
        return x.new_empty(x.shape[0], at.room, heads, dim).transpose(1, 2)

    results = [empty_result(q, v)[0]]
    for _ in range(count):
        results.append(q.new_empty(q.shape[0], num_query, at.room, dtype=accumulation_dtype(q.dtype)))
        results += [stored(q, num_query, q.shape[3]), stored(k, num_key, k.shape[3]), stored(v, num_key, v.shape[3])]
        results.append(stored(q, num_query, v.shape[3]))
    return *results, *(q.new_empty(0) for _ in range(NUM_KEPT * (NUM_ROUNDS - count)))


def _as_grid(axis: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of USP whose inner ranks are all ranks."""
    return axis | {"inner_size": axis["world_size"], "inner_group": axis["group"], "outer_group": ""}


def _ulysses(*arguments: Any, **axis: Any) -> tuple[Tensor, ...]:
    return _usp(*arguments, **_as_grid(axis))


def _ulysses_backward(*arguments: Any, **axis: Any) -> Gradients:
    return _usp_backward(*arguments, **_as_grid(axis))


def _ulysses_results(*arguments: Any, **axis: Any) -> tuple[Tensor, ...]:
    return _usp_results(*arguments, **_as_grid(axis))


NUM_KEPT = 5  # tensors of each round: lse, q, k, v, out
_KEPT = NUM_KEPT * NUM_ROUNDS - 1  # behind out and lse
AXIS = "SymInt length, str layout, int world_size, str group"
MESSAGES = f"{AXIS}, int heads_per_message=0"
GRID = f"{AXIS}, int inner_size, str inner_group, str outer_group"

registration.define("ring_attention", _ring, _ring_backward, _results, num_kept=0, axis=AXIS)
registration.define("gather_attention", _gather, _gather_backward, _results, num_kept=0, axis=MESSAGES)
# The same with a name of its own: only the tokens within reach of a window travel.
registration.define("halo_attention", _gather, _gather_backward, _results, num_kept=0, axis=MESSAGES)
# Its k and v are whole, in the user's order.
registration.define("latent_attention", _latent, _latent_backward, _results, num_kept=0, axis=AXIS)
# Its k and v are of all tokens too, and of this rank's heads.
registration.define(
    "latent_heads_attention", _latent_heads, _latent_heads_backward, _latent_heads_results, num_kept=5, axis=AXIS
)
registration.define("ulysses_attention", _ulysses, _ulysses_backward, _ulysses_results, num_kept=_KEPT, axis=AXIS)
registration.define("usp_attention", _usp, _usp_backward, _usp_results, num_kept=_KEPT, axis=GRID)
