"""Strategies: the attention operators of a rewritten graph, one for each way in which ranks share the work.

All take local q, k and v `[B, heads, local tokens, D]`, padding slots included, and return (out, lse, *kept) of the local rows. Rows of a
mask are the local ones, except for those that exchange heads, which take it whole; all else in `Terms` is of the whole sequence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cpcompile.layout import local_length
from cpcompile.runtime import gather, operators, ring, ulysses
from cpcompile.runtime.heads import storage
from cpcompile.runtime.merge import accumulation_dtype
from cpcompile.runtime.partial import empty_result
from cpcompile.runtime.post import Ring
from cpcompile.runtime.schedule import Spans, local_spans
from cpcompile.runtime.terms import Terms

Tensor = torch.Tensor
AXIS = "SymInt length, str layout, int world_size, str group"


def _spans(length: int, layout: str, world_size: int) -> tuple[Spans, ...]:
    return tuple(local_spans(length, rank, world_size, layout) for rank in range(world_size))


def _results(q: Tensor, k: Tensor, v: Tensor, *values: Any, **axis: Any) -> tuple[Tensor, Tensor]:
    return empty_result(q, v)


def _ring(q: Tensor, k: Tensor, v: Tensor, *values: Any, length: int, layout: str, world_size: int, group: str) -> Any:
    terms, spans = Terms.of(q, k, values, length), _spans(length, layout, world_size)
    ring.refuse_bias(terms)
    return ring.attend(q, k, v, terms, spans, Ring.of(group, world_size))


def _ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
) -> Any:
    terms, spans = Terms.of(q, k, values, length), _spans(length, layout, world_size)
    return ring.attend_backward(dout, q, k, v, out, lse, terms, spans, Ring.of(group, world_size))


def _gather(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    heads_per_message: int = 0,
) -> Any:
    terms, spans = Terms.of(q, k, values, length), _spans(length, layout, world_size)
    return gather.attend(q, k, v, terms, spans, Ring.of(group, world_size), heads_per_message)


def _gather_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    heads_per_message: int = 0,
) -> Any:
    terms, spans = Terms.of(q, k, values, length), _spans(length, layout, world_size)
    axis = Ring.of(group, world_size)
    return gather.attend_backward(dout, q, k, v, out, lse, terms, spans, axis, heads_per_message)


def _room(length: int, layout: str, world_size: int, inner_size: int) -> int:
    """Return the slots for the tokens that the inner ranks of a group hold."""
    return length if inner_size == world_size else inner_size * local_length(length, world_size, layout)


def _grid(
    length: int, layout: str, world_size: int, inner_size: int, inner_group: str, outer_group: str
) -> ulysses.Grid:
    """Return the grid of ranks: rank r of the axis is at (outer r // inner_size, inner r % inner_size)."""
    spans = _spans(length, layout, world_size)
    rows = tuple(spans[start : start + inner_size] for start in range(0, world_size, inner_size))
    room = _room(length, layout, world_size, inner_size)
    return ulysses.Grid(Ring.of(inner_group, inner_size), Ring.of(outer_group, world_size // inner_size), rows, room)


def _in_grid(terms: Terms, grid: ulysses.Grid) -> Terms:
    """Return the terms with the rows of the mask that the inner ranks of this one hold."""
    mask = terms.mask
    if mask is None or mask.shape[2] == 1 or grid.outer.size == 1:
        return terms
    rows = torch.cat([mask[:, :, span.positions] for span in grid.rows[grid.outer.rank]], 2)
    return replace(terms, mask=rows)


def _usp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    inner_size: int,
    inner_group: str,
    outer_group: str,
) -> Any:
    grid = _grid(length, layout, world_size, inner_size, inner_group, outer_group)
    terms = _in_grid(Terms.of(q, k, values, length), grid)
    if grid.outer.size > 1:
        ring.refuse_bias(terms)
    out, (lse, *kept) = ulysses.attend(q, k, v, terms, grid)
    return out, lse, *kept


def _usp_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: list[Tensor],
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    inner_size: int,
    inner_group: str,
    outer_group: str,
) -> Any:
    grid = _grid(length, layout, world_size, inner_size, inner_group, outer_group)
    terms = _in_grid(Terms.of(q, k, values, length), grid)
    return ulysses.attend_backward(dout, q, k, v, (lse, *kept), terms, grid)  # type: ignore[arg-type]


def _usp_results(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *values: Any,
    length: int,
    layout: str,
    world_size: int,
    group: str,
    inner_size: int,
    inner_group: str,
    outer_group: str,
) -> tuple[Tensor, ...]:
    # All ranks run the graph that one of them traced: sizes do not depend on the rank.
    num_query, num_key = storage(inner_size, q.shape[1], k.shape[1])
    tokens = _room(length, layout, world_size, inner_size)
    batch = q.shape[0]

    def stored(x: Tensor, heads: int) -> Tensor:
        return x.new_empty(batch, tokens, heads, x.shape[3]).transpose(1, 2)

    lse = q.new_empty(batch, num_query, tokens, dtype=accumulation_dtype(q.dtype))
    out = q.new_empty(batch, tokens, num_query, v.shape[3]).transpose(1, 2)
    return empty_result(q, v)[0], lse, stored(q, num_query), stored(k, num_key), stored(v, num_key), out


def _ulysses(q: Tensor, k: Tensor, v: Tensor, *values: Any, world_size: int, group: str, **axis: Any) -> Any:
    inner = {"inner_size": world_size, "inner_group": group, "outer_group": ""}
    return _usp(q, k, v, *values, world_size=world_size, group=group, **axis, **inner)


def _ulysses_backward(*arguments: Any, world_size: int, group: str, **axis: Any) -> Any:
    inner = {"inner_size": world_size, "inner_group": group, "outer_group": ""}
    return _usp_backward(*arguments, world_size=world_size, group=group, **axis, **inner)


def _ulysses_results(*arguments: Any, world_size: int, group: str, **axis: Any) -> tuple[Tensor, ...]:
    inner = {"inner_size": world_size, "inner_group": group, "outer_group": ""}
    return _usp_results(*arguments, world_size=world_size, group=group, **axis, **inner)


MESSAGES = f"{AXIS}, int heads_per_message=0"
GRID = f"{AXIS}, int inner_size, str inner_group, str outer_group"

operators.define("ring_attention", _ring, _ring_backward, _results, num_kept=0, axis=AXIS)
operators.define("gather_attention", _gather, _gather_backward, _results, num_kept=0, axis=MESSAGES)
# The same with a name of its own: only the tokens within reach of a window travel.
operators.define("halo_attention", _gather, _gather_backward, _results, num_kept=0, axis=MESSAGES)
operators.define("ulysses_attention", _ulysses, _ulysses_backward, _ulysses_results, num_kept=4, axis=AXIS)
operators.define("usp_attention", _usp, _usp_backward, _usp_results, num_kept=4, axis=GRID)
