"""Latent: attention whose keys and values every rank has computed for all tokens, from a narrow value that was gathered.

Nothing is sent here. A rank's gradients of keys and values are what its own rows add to them; the sum over the ranks is taken
where it is narrow, of the gradient of what was gathered.
"""

from __future__ import annotations

import torch

from cpcompile.balance.token_spans import Spans
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.attention.partial_results import Gradient, Result, add_gradients
from cpcompile.runtime.attention.sinks import sinks_gradient, with_sinks
from cpcompile.runtime.kernels.lanes import Lanes
from cpcompile.runtime.schedule import whole

Tensor = torch.Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, rows: Spans) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the local rows over whole k and v, `[B, K, S, D]` in the user's order. `rows`: where q's are."""
    pieces = terms.pieces(rows, whole(k.shape[2]))
    result = Result(q, v, 1, len(pieces))
    result.add(q, k, v, pieces, terms)
    return with_sinks(*result.finish(), terms.sinks)


def attend_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, terms: AttentionArguments, rows: Spans
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (dq, dk, dv, dsinks); dk and dv are whole, and what the local rows add to them."""
    pieces = terms.pieces(rows, whole(k.shape[2]))
    found = Gradient(q, 1), Gradient(k, len(rows) + 1), Gradient(v, len(rows) + 1)
    lanes = Lanes(q.device, len(pieces))
    add_gradients(*found, (dout, q, k, v, out, lse), pieces, terms, lanes)
    lanes.flush()
    dq, dk, dv = (x.finish() for x in found)
    return dq, dk, dv, sinks_gradient(dout, out, lse, terms.sinks)


# Composite, so that it is gone once the graph is compiled: placing it gathers its operand, and it is what it takes.
torch.library.define("cpcompile::whole_tokens", "(Tensor(a) x) -> Tensor(a)")
torch.library.impl("cpcompile::whole_tokens", "CompositeImplicitAutograd")(lambda x: x.view_as(x))
