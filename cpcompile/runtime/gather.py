"""Gathered attention: every rank computes its own query rows over all the keys that they see (the scheme of Llama 3, Dubey et al., 2024).

Only needed keys travel: all earlier ones for causal attention, W tokens of a neighbour for a window. Keys are fetched by heads, so that some
heads are computed while the next ones arrive, and again in backward: between the passes a rank holds its own keys only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cpcompile.runtime.partial import Gradient, Result, add_gradients, empty_result
from cpcompile.runtime.post import Ring, Transfer, post
from cpcompile.runtime.ring import by_token
from cpcompile.runtime.schedule import Needs, Span, Spans, by_position, needs
from cpcompile.runtime.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.terms import Terms

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Heads:
    """Some key heads, the query heads that read them, and the keys that this rank's rows see, in the order of their positions."""

    query: slice
    key: slice
    k: Tensor
    v: Tensor
    transfers: tuple[Transfer, ...]


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

    def held(self, receiver: int) -> Spans:
        """Return the tokens that `receiver` gathers, in the order of their positions."""
        return by_position([span for spans in self.needs.of[receiver] for span in spans])

    def slots_of(self, receiver: int, source: int) -> list[Span]:
        """Return what `receiver` has of `source`, in the slots of what it gathers."""
        held = self.held(receiver)
        found = []
        for span in self.needs.of[receiver][source]:
            (run,) = [h for h in held if h.position <= span.position < h.end]
            found.append(run.between(span.position, span.end))
        return found

    def heads(self) -> list[tuple[slice, slice]]:
        """Return the (query heads, key heads) of each message."""
        num_key = self.k.shape[1]
        size, group = self.heads_per_message or num_key, self.num_query // num_key
        return [
            (slice(i * group, min(i + size, num_key) * group), slice(i, min(i + size, num_key)))
            for i in range(0, num_key, size)
        ]

    def __iter__(self) -> Iterator[Heads]:
        """Yield the keys of some heads; the next ones are on their way meanwhile."""
        heads = self.heads()
        arriving = self._fetch(*heads[0])
        for following in (*heads[1:], None):
            block = arriving
            for transfer in block.transfers:
                transfer.wait()
            if following is not None:
                arriving = self._fetch(*following)
            yield block

    def _fetch(self, query: slice, key: slice) -> Heads:
        own = [x[:, key] for x in (self.k, self.v)]
        rank, size = self.ring.rank, sum(span.size for span in self.held(self.ring.rank))
        whole = [x.new_empty(size, *x.shape[:2], x.shape[3]) for x in own]
        for x, to in zip(own, whole, strict=True):
            for span, slots in zip(self.needs.of[rank][rank], self.slots_of(rank, rank), strict=True):
                to[slots.slots] = x[:, :, span.slots].permute(2, 0, 1, 3)
        transfers = []
        if self.needs.steps:
            posted = post(by_token(own, self.ring), self.ring)
            for step in self.needs.steps:
                slots = self.slots_of(rank, self.ring.before(step))
                into = [to[span.slots] for to in whole for span in slots]
                transfers.append(posted.start(step, into, lambda r, s: self._parts(own, r, s)))
        k, v = (x.permute(1, 2, 0, 3) for x in whole)
        return Heads(query, key, k, v, tuple(transfers))

    def _parts(self, own: list[Tensor], receiver: int, source: int) -> list[slice]:
        runs, start = [], 0
        for x in own:
            token = x.numel() // x.shape[2]
            runs += [
                slice(start + span.slot * token, start + (span.slot + span.size) * token)
                for span in self.needs.of[receiver][source]
            ]
            start += x.numel()
        return runs

    def send_home(self, dk: Tensor, dv: Tensor, total: tuple[Gradient, Gradient]) -> None:
        """Add to `total` what all ranks found of this rank's keys; dk and dv `[B, K, tokens, D]` are of what it gathered."""
        rank, steps, found = self.ring.rank, self.needs.steps, (dk, dv)
        for gradient, x in zip(total, found, strict=True):
            for span, slots in zip(self.needs.of[rank][rank], self.slots_of(rank, rank), strict=True):
                gradient.add(x[:, :, slots.slots], span.slots)
        if not steps:
            return
        posted = post(by_token(found, self.ring), self.ring)
        tokens = [x.shape[0] * x.shape[1] * x.shape[3] for x in found]

        def parts(receiver: int, source: int) -> list[slice]:
            runs, start = [], 0
            length = sum(span.size for span in self.held(source))
            for token in tokens:
                runs += [
                    slice(start + s.slot * token, start + (s.slot + s.size) * token)
                    for s in self.slots_of(source, receiver)
                ]
                start += length * token
            return runs

        under_way = []
        for step in steps:  # what fetched from the rank `step` before goes back there
            spans = self.needs.of[self.ring.after(step)][rank]
            arrived = [[x.new_empty(span.size, *x.shape[:2], x.shape[3]) for span in spans] for x in found]
            transfer = posted.start(self.ring.size - step, [part for x in arrived for part in x], parts)
            under_way.append((transfer, spans, arrived))
        for transfer, spans, arrived in under_way:
            transfer.wait()
            for gradient, x in zip(total, arrived, strict=True):
                for span, part in zip(spans, x, strict=True):
                    gradient.add(part.permute(1, 2, 0, 3), span.slots)


def attend(
    q: Tensor, k: Tensor, v: Tensor, terms: Terms, spans: tuple[Spans, ...], ring: Ring, heads_per_message: int = 0
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over all keys; `heads_per_message` key heads travel at once, 0: all."""
    rows = spans[ring.rank]
    gathered = Gathered(k, v, q.shape[1], spans, needs(spans, terms.visible), heads_per_message, ring)
    columns, parts = gathered.held(ring.rank), []
    for heads in gathered:
        part = Result(q[:, heads.query], v, num_blocks=1)
        of_heads = terms.of_heads(heads.query.start, heads.query.stop)
        part.add(q[:, heads.query], heads.k, heads.v, rows, columns, of_heads)
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
    terms: Terms,
    spans: tuple[Spans, ...],
    ring: Ring,
    heads_per_message: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks): the gradients of gathered keys go home, where they are summed."""
    rows = spans[ring.rank]
    gathered = Gathered(k, v, q.shape[1], spans, needs(spans, terms.visible), heads_per_message, ring)
    columns, parts = gathered.held(ring.rank), []
    for heads in gathered:
        query, key = heads.query, heads.key
        found = Gradient(q[:, query], 1), Gradient(heads.k, 1), Gradient(heads.v, 1)
        tensors = dout[:, query], q[:, query], heads.k, heads.v, out[:, query], lse[:, query]
        add_gradients(*found, tensors, rows, columns, terms.of_heads(query.start, query.stop))
        dq, dk_all, dv_all = (x.finish() for x in found)
        num_blocks = 1 + len(gathered.needs.steps)
        home = Gradient(k[:, key], num_blocks), Gradient(v[:, key], num_blocks)
        gathered.send_home(dk_all, dv_all, home)
        parts.append((dq, *(x.finish() for x in home)))
    dsinks = sinks_gradient(dout, out, lse, terms.sinks)
    if len(parts) == 1:
        return *parts[0], dsinks
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for to, pieces in zip((dq, dk, dv), zip(*parts, strict=True), strict=True):
        torch.cat(pieces, 1, out=to)
    return dq, dk, dv, dsinks
