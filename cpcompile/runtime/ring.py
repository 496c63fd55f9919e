"""Ring attention: each rank computes its query rows over the keys of one rank after the other (Liu et al., 2023).

Blocks come straight from their owners, only the tokens that some row sees, the next while this one is computed. The
gradients of a block go straight home, where they are summed. With the zig-zag layout every rank has the same causal work at
each step: half a block, without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from cpcompile.runtime.lanes import Lanes
from cpcompile.runtime.messages import by_head, by_token, room, runs
from cpcompile.runtime.partial import Gradient, Result, add_gradients
from cpcompile.runtime.post import Posted, Ring, Transfer, post
from cpcompile.runtime.schedule import Needs, Piece, Span, Spans, needs, num_tokens, packed
from cpcompile.runtime.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.terms import Terms

Tensor = torch.Tensor


@dataclass(frozen=True)
class Blocks:
    """Keys and values of the ranks of a ring. `spans`: the tokens of each rank, in the slots of k and v."""

    k: Tensor
    v: Tensor
    spans: tuple[Spans, ...]
    terms: Terms
    ring: Ring

    @cached_property
    def _plan(self) -> Needs:
        return needs(self.spans, self.terms.visible)

    def needs(self, receiver: int, source: int) -> Spans:
        """Return which tokens of `source` the rows of `receiver` see."""
        return self._plan.of[receiver][source]

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps, after the first with the own block, at which some rank sees something of the other's."""
        return self._plan.steps

    def pieces(self, step: int) -> tuple[Piece, ...]:
        """Return the rectangles that this rank computes at a step; columns are in the slots of what is fetched."""
        rank, source = self.ring.rank, self.ring.before(step)
        columns = packed(self.needs(rank, source)) if step else self.spans[rank]
        return self.terms.pieces(self.spans[rank], columns)

    @property
    def most_pieces(self) -> int:
        """How many rectangles this rank computes in one block, at most."""
        return max(len(self.pieces(step)) for step in (0, *self.steps))

    def __iter__(self) -> Iterator[tuple[tuple[Piece, ...], Tensor, Tensor]]:
        """Yield (pieces, k, v) of each block that some rank sees, the own first; the next is on its way meanwhile."""
        posted = self.post() if self.steps else None
        arriving = [self.start(posted, step) for step in self.steps[:1]] if posted else []
        yield self.pieces(0), self.k, self.v
        for step, following in zip(self.steps, (*self.steps[1:], 0), strict=True) if posted else ():
            block = arriving.pop()
            block.transfer.wait()
            if following and posted:
                arriving.append(self.start(posted, following))
            yield self.pieces(step), block.k, block.v

    def post(self) -> Posted:
        """Let the others fetch keys and values."""
        return post(by_token([self.k, self.v], self.ring), self.ring, num_starts=len(self.steps))

    def start(self, posted: Posted, step: int) -> Arriving:
        """Start fetching what this rank needs at `step`."""
        columns = packed(self.needs(self.ring.rank, self.ring.before(step)))
        fetched = room(num_tokens(columns), (self.k, self.v))
        into = [x[span.slots] for x in fetched for span in columns]
        transfer = posted.start([step], [into], self._parts)
        k, v = map(by_head, fetched)
        return Arriving(k, v, transfer)

    def _parts(self, receiver: int, source: int) -> list[slice]:
        return runs(self.needs(receiver, source), (self.k, self.v), self.k.shape[2])


@dataclass(frozen=True, slots=True)
class Arriving:
    """Keys and values `[B, K, tokens, D]` on their way."""

    k: Tensor
    v: Tensor
    transfer: Transfer


def refuse_bias(terms: Terms) -> None:
    """Refuse a float mask: a row of finfo.min averages over all keys, which the sums of blocks cannot keep."""
    if terms.mask is not None and terms.mask.dtype != torch.bool:
        raise ValueError("ring attention takes a bool mask only: a float mask needs whole rows, use gather_attention")


def attend(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, spans: tuple[Spans, ...], ring: Ring
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys. `spans`: the tokens of each rank, in slots by position."""
    blocks = Blocks(k, v, spans, terms, ring)
    result = Result(q, v, 1 + len(blocks.steps), blocks.most_pieces)
    for pieces, k_, v_ in blocks:
        result.add(q, k_, v_, pieces, terms)
    return with_sinks(*result.finish(), terms.sinks)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
    spans: tuple[Spans, ...],
    ring: Ring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks). The gradients of a block go home while the next one is computed."""
    blocks = Blocks(k, v, spans, terms, ring)
    num_blocks, lanes = 1 + len(blocks.steps), Lanes(q.device, blocks.most_pieces)
    dq, dk, dv = (Gradient(x, num_blocks) for x in (q, k, v))
    computing: list[tuple[int, int, Gradient, Gradient]] = []
    on_their_way: list[Homecoming] = []

    def send_home() -> None:
        """Send the gradients of the block that was started first; those sent before have had time to arrive."""
        number, step, block_dk, block_dv = computing.pop(0)
        lanes.wait(number)
        homecoming = Homecoming(block_dk.finish(), block_dv.finish(), blocks, step)
        while on_their_way:
            on_their_way.pop().add_to(dk, dv)
        on_their_way.append(homecoming)

    for step, (pieces, k_, v_) in zip((0, *blocks.steps), blocks, strict=True):
        own = (dk, dv) if step == 0 else (Gradient(k_, 1), Gradient(v_, 1))
        number = add_gradients(dq, *own, (dout, q, k_, v_, out, lse), pieces, terms, lanes)
        if len(computing) > 0:
            send_home()
        if step:
            computing.append((number, step, *own))
    if computing:
        send_home()
    lanes.flush()
    for homecoming in on_their_way:
        homecoming.add_to(dk, dv)
    return dq.finish(), dk.finish(), dv.finish(), sinks_gradient(dout, out, lse, terms.sinks)


class Homecoming:
    """The gradients of a block on their way from the rank that computed with it to its owner."""

    def __init__(self, dk: Tensor, dv: Tensor, blocks: Blocks, step: int) -> None:
        """Send the gradients of what this rank fetched at `step`."""
        ring, like = blocks.ring, (blocks.k, blocks.v)
        self._spans = blocks.needs(ring.after(step), ring.rank)
        arrived = room(num_tokens(self._spans), like)

        def parts(receiver: int, source: int) -> list[slice]:
            size = num_tokens(blocks.needs(source, receiver))
            return runs([Span(0, 0, size)] if size else [], like, size)

        # What was fetched from the rank `step` before goes back there: round the ring the other way.
        largest = sum(x.numel() for x in like)
        posted = post(by_token([dk, dv], ring, largest), ring, num_starts=1)
        self._transfer = posted.start([ring.size - step], [arrived if self._spans else []], parts)
        self._dk, self._dv = map(by_head, arrived)

    def add_to(self, dk: Gradient, dv: Gradient) -> None:
        """Add what came home to the gradients of the own block."""
        self._transfer.wait()
        for gradient, x in ((dk, self._dk), (dv, self._dv)):
            for span, to in zip(packed(self._spans), self._spans, strict=True):
                gradient.add(x[:, :, span.slots], to.slots)
