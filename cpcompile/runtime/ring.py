"""Ring attention: each rank computes its query rows over the keys of one rank after the other (Liu et al., 2023).

Blocks come straight from their owners, only the tokens that some row sees, the next while this one is computed. The gradients of a block go
straight home, where they are summed. With the zig-zag layout every rank has the same causal work at each step: half a block, without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from cpcompile.runtime.partial import Gradient, Result, add_gradients
from cpcompile.runtime.post import Posted, Ring, Transfer, new_message, post
from cpcompile.runtime.schedule import Needs, Spans, needs, packed
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

    def __iter__(self) -> Iterator[tuple[Spans, Tensor, Tensor]]:
        """Yield (columns, k, v) of each block that some row of this rank may see, its own first; the next is on its way meanwhile."""
        posted = self.post() if self.steps else None
        arriving = [self.start(posted, step) for step in self.steps[:1]] if posted else []
        yield self.spans[self.ring.rank], self.k, self.v
        for following in (*self.steps[1:], 0) if posted else ():
            block = arriving.pop()
            block.transfer.wait()
            if following and posted:
                arriving.append(self.start(posted, following))
            yield block.columns, block.k, block.v

    def post(self) -> Posted:
        """Let the others fetch keys and values."""
        return post(by_token([self.k, self.v], self.ring), self.ring)

    def start(self, posted: Posted, step: int) -> Arriving:
        """Start fetching what this rank needs at `step`."""
        columns = packed(self.needs(self.ring.rank, self.ring.before(step)))
        size = sum(span.size for span in columns)
        fetched = [x.new_empty(size, *x.shape[:2], x.shape[3]) for x in (self.k, self.v)]
        transfer = posted.start(step, [x[span.slots] for x in fetched for span in columns], self._parts)
        k, v = (x.permute(1, 2, 0, 3) for x in fetched)
        return Arriving(k, v, columns, transfer)

    def _parts(self, receiver: int, source: int) -> list[slice]:
        runs, start = [], 0
        for x in (self.k, self.v):
            token = x.numel() // x.shape[2]
            spans = self.needs(receiver, source)
            runs += [slice(start + s.slot * token, start + (s.slot + s.size) * token) for s in spans]
            start += x.numel()
        return runs


@dataclass(frozen=True, slots=True)
class Arriving:
    """Keys and values `[B, K, tokens, D]` on their way, and which tokens they are."""

    k: Tensor
    v: Tensor
    columns: Spans
    transfer: Transfer


def by_token(tensors: Sequence[Tensor], ring: Ring) -> Tensor:
    """Lay tensors `[B, K, tokens, D]` end to end in a message, each with tokens first, so that a run of tokens is one of memory."""
    sizes = [x.numel() for x in tensors]
    message = new_message(sum(sizes), tensors[0], ring)
    for part, x in zip(message.split(sizes), tensors, strict=True):
        tokens_first = x.permute(2, 0, 1, 3)
        part.view(tokens_first.shape).copy_(tokens_first)
    return message


def refuse_bias(terms: Terms) -> None:
    """Refuse a float mask: a row of finfo.min averages over all keys, which the sums of blocks cannot keep."""
    if terms.mask is not None and terms.mask.dtype != torch.bool:
        raise ValueError("ring attention takes a bool mask only: a float mask needs whole rows, use gather_attention")


def attend(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, spans: tuple[Spans, ...], ring: Ring
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys. `spans`: the tokens of each rank, in slots by position."""
    blocks, rows = Blocks(k, v, spans, terms, ring), spans[ring.rank]
    result = Result(q, v, num_blocks=1 + len(blocks.steps))
    for columns, k_, v_ in blocks:
        result.add(q, k_, v_, rows, columns, terms)
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
    blocks, rows = Blocks(k, v, spans, terms, ring), spans[ring.rank]
    num_blocks = 1 + len(blocks.steps)
    dq, dk, dv = (Gradient(x, num_blocks) for x in (q, k, v))
    under_way: Homecoming | None = None
    for step, (columns, k_, v_) in zip((0, *blocks.steps), blocks, strict=True):
        if step == 0:
            add_gradients(dq, dk, dv, (dout, q, k, v, out, lse), rows, columns, terms)
            continue
        block_dk, block_dv = Gradient(k_, 1), Gradient(v_, 1)
        add_gradients(dq, block_dk, block_dv, (dout, q, k_, v_, out, lse), rows, columns, terms)
        if under_way is not None:
            under_way.add_to(dk, dv)
        under_way = Homecoming(block_dk.finish(), block_dv.finish(), blocks, step)
    if under_way is not None:
        under_way.add_to(dk, dv)
    return dq.finish(), dk.finish(), dv.finish(), sinks_gradient(dout, out, lse, terms.sinks)


class Homecoming:
    """The gradients of a block on their way from the rank that computed with it to its owner."""

    def __init__(self, dk: Tensor, dv: Tensor, blocks: Blocks, step: int) -> None:
        """Send the gradients of what this rank fetched at `step`."""
        ring = blocks.ring
        self._spans = blocks.needs(ring.after(step), ring.rank)
        size = sum(span.size for span in self._spans)
        like = blocks.k, blocks.v
        arrived = [x.new_empty(size, *x.shape[:2], x.shape[3]) for x in like]
        tokens = [x.numel() // x.shape[2] for x in like]

        def parts(receiver: int, source: int) -> list[slice]:
            size = sum(span.size for span in blocks.needs(source, receiver))
            return [slice(0, size * tokens[0]), slice(size * tokens[0], size * sum(tokens))] if size else []

        # What fetched from the rank `step` before goes back there: round the ring the other way.
        posted = post(by_token([dk, dv], ring), ring)
        self._transfer = posted.start(ring.size - step, arrived if size else [], parts)
        self._dk, self._dv = (x.permute(1, 2, 0, 3) for x in arrived)

    def add_to(self, dk: Gradient, dv: Gradient) -> None:
        """Add what came home to the gradients of the own block."""
        self._transfer.wait()
        for gradient, x in ((dk, self._dk), (dv, self._dv)):
            for span, to in zip(packed(self._spans), self._spans, strict=True):
                gradient.add(x[:, :, span.slots], to.slots)
