"""Gathered attention: every rank computes its own query rows over all the keys that they see (Llama 3, Dubey et al., 2024).

Only needed keys travel: all earlier ones for causal attention, W tokens of a neighbour for a window. Keys are fetched by
heads, so that some heads are computed while the next ones arrive, and again in backward: between the passes a rank holds
its own keys only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.key_needs import Needs, needs, packed
from cpcompile.runtime.attention.partial_results import Gradient, Result, add_gradients, empty_result
from cpcompile.runtime.attention.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.kernels.lanes import Lanes
from cpcompile.runtime.schedule import num_tokens
from cpcompile.runtime.transport.messages import by_head, by_token, parts_of, room, runs
from cpcompile.runtime.transport.post import Ring, Transfer, post

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class GatheredHeads:
    """Some key heads, the query heads that read them, and the keys that this rank's rows see, in the order of their positions."""

    query: slice
    key: slice
    k: Tensor
    v: Tensor
    transfer: Transfer | None


@dataclass(frozen=True, slots=True)
class Gathered:
    """The keys that the rows of a rank see. `spans`: the tokens of each rank, in the slots of k and v."""

    k: Tensor
    v: Tensor
    num_query: int
    spans: tuple[Spans, ...]
    needs: Needs
    heads_per_message: int
    ring: Ring

    def heads(self) -> list[tuple[slice, slice]]:
        """Return the (query heads, key heads) of each message."""
        num_key = self.k.shape[1]
        size, group = self.heads_per_message or num_key, self.num_query // num_key
        return [
            (slice(i * group, min(i + size, num_key) * group), slice(i, min(i + size, num_key)))
            for i in range(0, num_key, size)
        ]

    def __iter__(self) -> Iterator[GatheredHeads]:
        """Yield the keys of some heads; the next ones are on their way meanwhile."""
        heads = self.heads()
        arriving = self._fetch(*heads[0])
        for following in (*heads[1:], None):
            block = arriving
            if block.transfer is not None:
                block.transfer.wait()
            if following is not None:
                arriving = self._fetch(*following)
            yield block

    def _fetch(self, query: slice, key: slice) -> GatheredHeads:
        own, rank = (self.k[:, key], self.v[:, key]), self.ring.rank
        whole = room(num_tokens(self.needs.held[rank]), own)
        for x, to in zip(own, whole, strict=True):
            for span, slots in zip(self.needs.of[rank][rank], self.needs.within[rank][rank], strict=True):
                by_head(to[slots.slots]).copy_(x[:, :, span.slots])

        def parts(receiver: int, source: int) -> tuple[slice, ...]:
            return runs(self.needs.of[receiver][source], own, self.k.shape[2])

        transfer = None
        if self.needs.steps:
            posted = post(by_token(own, self.ring), self.ring, num_starts=len(self.needs.steps))
            slots_of = [self.needs.within[rank][self.ring.before(step)] for step in self.needs.steps]
            into = [[to[run.slots] for to in whole for run in runs_of] for runs_of in slots_of]
            transfer = posted.start(self.needs.steps, into, parts)
        k, v = map(by_head, whole)
        return GatheredHeads(query, key, k, v, transfer)

    def send_home(self, dk: Tensor, dv: Tensor, total: tuple[Gradient, Gradient]) -> None:
        """Add to `total` what all ranks found of this rank's keys; dk and dv are of what it gathered."""
        rank, steps, found = self.ring.rank, self.needs.steps, (dk, dv)
        for gradient, x in zip(total, found, strict=True):
            for span, slots in zip(self.needs.of[rank][rank], self.needs.within[rank][rank], strict=True):
                gradient.add(x[:, :, slots.slots], span.slots)
        if not steps:
            return

        def parts(receiver: int, source: int) -> tuple[slice, ...]:
            return runs(self.needs.within[source][receiver], found, num_tokens(self.needs.held[source]))

        token = sum(x.shape[0] * x.shape[1] * x.shape[3] for x in found)
        largest = token * max(num_tokens(held) for held in self.needs.held)
        posted = post(by_token(found, self.ring, largest), self.ring, num_starts=len(steps))
        # What was fetched from the rank `step` before goes back there.
        sources = [self.needs.of[self.ring.after(step)][rank] for step in steps]
        rooms = [room(num_tokens(spans), found) for spans in sources]
        into = [parts_of(arrived, spans) for spans, arrived in zip(sources, rooms, strict=True)]
        posted.start([self.ring.size - step for step in steps], into, parts).wait()
        for spans, arrived in zip(sources, rooms, strict=True):
            for gradient, x in zip(total, map(by_head, arrived), strict=True):
                for span, to in zip(packed(spans), spans, strict=True):
                    gradient.add(x[:, :, span.slots], to.slots)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    terms: AttentionArguments,
    spans: tuple[Spans, ...],
    ring: Ring,
    heads_per_message: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys; `heads_per_message` key heads travel at once, 0: all."""
    rows = spans[ring.rank]
    gathered = Gathered(k, v, q.shape[1], spans, needs(spans, terms.visible), heads_per_message, ring)
    pieces, parts = terms.pieces(rows, gathered.needs.held[ring.rank]), []
    for heads in gathered:
        part = Result(q[:, heads.query], v, 1, len(pieces))
        of_heads = terms.of_heads(heads.query.start, heads.query.stop)
        part.add(q[:, heads.query], heads.k, heads.v, pieces, of_heads)
        parts.append(part.finish())
    if len(parts) == 1:
        return with_sinks(*parts[0], terms.sinks)
    out, lse = empty_result(q, v)
    torch.cat([part[0] for part in parts], 1, out=out)
    torch.cat([part[1] for part in parts], 1, out=lse)
    return with_sinks(out, lse, terms.sinks)


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
    heads_per_message: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks): the gradients of gathered keys go home, where they are summed."""
    rows = spans[ring.rank]
    gathered = Gathered(k, v, q.shape[1], spans, needs(spans, terms.visible), heads_per_message, ring)
    pieces, parts, num_blocks = terms.pieces(rows, gathered.needs.held[ring.rank]), [], 1 + len(gathered.needs.steps)
    for heads in gathered:
        query, key = heads.query, heads.key
        # The rows of both chunks of a zig-zag rank add to the gradients of a key.
        found = Gradient(q[:, query], 1), Gradient(heads.k, 3), Gradient(heads.v, 3)
        tensors = dout[:, query], q[:, query], heads.k, heads.v, out[:, query], lse[:, query]
        lanes = Lanes(q.device, len(pieces))
        add_gradients(*found, tensors, pieces, terms.of_heads(query.start, query.stop), lanes)
        lanes.flush()
        home = Gradient(k[:, key], num_blocks), Gradient(v[:, key], num_blocks)
        gathered.send_home(found[1].finish(), found[2].finish(), home)
        parts.append((found[0].finish(), home[0].finish(), home[1].finish()))
    dsinks = sinks_gradient(dout, out, lse, terms.sinks)
    if len(parts) == 1:
        return *parts[0], dsinks
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for to, of_heads in zip((dq, dk, dv), zip(*parts, strict=True), strict=True):
        torch.cat(of_heads, 1, out=to)
    return dq, dk, dv, dsinks
