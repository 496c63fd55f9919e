"""Noise: drawn for the whole tensor."""

from __future__ import annotations

import torch

from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions.dropout import of_ranks
from cpcompile.inspect.definitions.slices import Calls, Ranks, join
from cpcompile.ir.placement import Sharded
from cpcompile.runtime.tokens import noise


def noise_tokens(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"])
    x = join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    index = torch.arange(x.numel(), device=x.device).view(x.shape)
    whole = noise.noise_at(c["seed"], c["site"], index, c["kind"], c["a"], c["b"]).to(x.dtype)
    return of_ranks(whole, at, c, len(calls))


def draw_noise(calls: Calls) -> Ranks:
    c, at = calls[0], Sharded(calls[0]["dim"], calls[0]["inner"], calls[0]["front"], calls[0]["back"])
    x = c["x"] if at.dim < 0 else join([c["x"] for c in calls], at, TokenOrder.of_call(c))
    whole = torch.empty([x.shape[d] for d in c["order"]], dtype=x.dtype, device=x.device)
    whole = whole.permute([c["order"].index(d) for d in range(x.dim())])
    return of_ranks(noise.drawn(whole, c["kind"], c["a"], c["b"]), at, c, len(calls))
