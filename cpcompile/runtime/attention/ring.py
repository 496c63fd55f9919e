"""Ring attention: each rank computes its query rows over the keys of one rank after the other (Liu et al., 2023).

Blocks come straight from their owners, only the tokens that some row sees, the next while this one is computed. The
gradients of a block go straight home, where they are summed. With the zig-zag layout every rank has the same causal work at
each step: half a block, without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cpcompile.balance.token_spans import Span, Spans
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.key_needs import Needs, Visit, needs, visits
from cpcompile.runtime.attention.partial_results import Gradient, Result, add_gradients
from cpcompile.runtime.attention.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.kernels.lanes import Lanes
from cpcompile.runtime.schedule import num_tokens
from cpcompile.runtime.transport.messages import by_head, by_token, parts_of, room, runs
from cpcompile.runtime.transport.post import Posted, Ring, Transfer, post

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """Keys and values of the ranks of a ring. `needs` says which tokens travel, `visits` what this rank computes with them."""

    k: Tensor
    v: Tensor
    needs: Needs
    visits: tuple[Visit, ...]
    ring: Ring

    @classmethod
    def of(cls, k: Tensor, v: Tensor, spans: tuple[Spans, ...], terms: AttentionArguments, ring: Ring) -> Blocks:
        """Return the blocks of a ring; `spans` are the tokens of each rank, in the slots of k and v."""
        return cls(k, v, needs(spans, terms.visible), visits(spans, terms.visible, ring.rank), ring)

    @property
    def num_pieces(self) -> int:
        """How many rectangles this rank computes."""
        return sum(len(visit.pieces) for visit in self.visits)

    def __iter__(self) -> Iterator[tuple[Visit, Tensor, Tensor]]:
        """Yield (visit, k, v) of each block that some rank sees, the own first; the next is on its way meanwhile."""
        own, *others = self.visits
        posted = self.post() if others else None
        arriving = self.start(posted, others[0]) if posted else None
        yield own, self.k, self.v
        for number, visit in enumerate(others, 1):
            block = arriving
            assert posted and block
            block.transfer.wait()
            if number < len(others):
                arriving = self.start(posted, others[number])
            yield visit, block.k, block.v

    def post(self) -> Posted:
        """Let the others fetch keys and values."""
        return post(by_token([self.k, self.v], self.ring), self.ring, num_starts=len(self.visits) - 1)

    def start(self, posted: Posted, visit: Visit) -> Arriving:
        """Start fetching what this rank needs."""
        fetched = room(visit.num_columns, (self.k, self.v))
        laid = self.needs.laid[self.ring.rank][self.ring.before(visit.step)]
        transfer = posted.start([visit.step], [parts_of(fetched, laid)], self._parts)
        k, v = map(by_head, fetched)
        return Arriving(k, v, transfer)

    def _parts(self, receiver: int, source: int) -> tuple[slice, ...]:
        return runs(self.needs.runs[receiver][source], (self.k, self.v), self.k.shape[2])


@dataclass(frozen=True, slots=True)
class Arriving:
    """Keys and values `[B, K, tokens, D]` on their way."""

    k: Tensor
    v: Tensor
    transfer: Transfer


def refuse_bias(terms: AttentionArguments) -> None:
    """Refuse a float mask: a row of finfo.min averages over all keys, which the sums of blocks cannot keep."""
    if terms.mask is not None and terms.mask.dtype != torch.bool:
        raise ValueError("ring attention takes a bool mask only: a float mask needs whole rows, use gather_attention")


def attend(
    q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, spans: tuple[Spans, ...], ring: Ring
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys. `spans`: the tokens of each rank, in slots by position."""
    blocks = Blocks.of(k, v, spans, terms, ring)
    result = Result(q, v, len(blocks.visits), blocks.num_pieces)
    for visit, k_, v_ in blocks:
        result.add(q, k_, v_, visit.pieces, terms)
    return with_sinks(*result.finish(), terms.sinks)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: AttentionArguments,
    spans: tuple[Spans, ...],
    ring: Ring,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks). The gradients of a block go home while the next one is computed."""
    blocks = Blocks.of(k, v, spans, terms, ring)
    num_blocks, lanes = len(blocks.visits), Lanes(q.device, blocks.num_pieces)
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

    for visit, k_, v_ in blocks:
        own = (Gradient(k_, 1), Gradient(v_, 1)) if visit.step else (dk, dv)
        number = add_gradients(dq, *own, (dout, q, k_, v_, out, lse), visit.pieces, terms, lanes)
        if len(computing) > 0:
            send_home()
        if visit.step:
            computing.append((number, visit.step, *own))
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
        given, needs = ring.after(step), blocks.needs
        self._runs, self._laid = needs.runs[given][ring.rank], needs.laid[given][ring.rank]
        arrived = room(num_tokens(self._runs), like)

        def parts(receiver: int, source: int) -> tuple[slice, ...]:
            size = num_tokens(needs.runs[source][receiver])
            return runs([Span(0, 0, size)] if size else [], like, size)

        # What was fetched from the rank `step` before goes back there: round the ring the other way.
        largest = sum(x.numel() for x in like)
        posted = post(by_token([dk, dv], ring, largest), ring, num_starts=1)
        self._transfer = posted.start([ring.size - step], [[x.view(-1) for x in arrived] if self._runs else []], parts)
        self._dk, self._dv = map(by_head, arrived)

    def add_to(self, dk: Gradient, dv: Gradient) -> None:
        """Add what came home to the gradients of the own block."""
        self._transfer.wait()
        for gradient, x in ((dk, self._dk), (dv, self._dv)):
            for run, at in zip(self._runs, self._laid, strict=True):
                gradient.add(x[:, :, at.slots], run.slots)
