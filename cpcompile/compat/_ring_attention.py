"""Attention over this rank's part of a sequence: the runtime's ring and gather, differentiable, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from cpcompile.balance.token_spans import Segments, Spans, Starts
from cpcompile.errors import ConfigError, InputError
from cpcompile.runtime import shared_seed
from cpcompile.runtime.attention import gather, ring
from cpcompile.runtime.attention.arguments import AttentionArguments
from cpcompile.runtime.kernels.block import Block
from cpcompile.runtime.schedule import Piece
from cpcompile.runtime.transport.post import Ring

Tensor = torch.Tensor
Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Return a function that runs as it is within compiled ones: the schedule of a step is made on the host."""
    disable: Any = torch.compiler.disable  # without types
    found: Function = disable(function)
    return found


@dataclass(frozen=True, slots=True)
class Options:
    """The arguments that all functions share, as flash_attn documents them.

    Attributes:
        dropout_p: probability of a weight being dropped.
        softmax_scale: factor of the scores; None: `1 / sqrt(head dim)`.
        causal: keys after the query are hidden.
        window_size: how many keys before and after the query are visible, -1 for all.
        alibi_slopes: `[H]`, or None.
        deterministic: the same bits at each run.
        return_attn_probs: return (out, lse, None) instead of out.
        group: the ranks that share the sequence; None: all.
    """

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int]
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    group: dist.ProcessGroup | None

    def ring(self) -> Ring:
        """Return the ranks."""
        if not dist.is_initialized():
            raise ConfigError(
                "context parallelism needs process groups: call torch.distributed.init_process_group first."
            )
        group = self.group or dist.group.WORLD
        assert group is not None
        rank = dist.get_rank(group)
        if rank < 0:
            raise ConfigError(f"rank {dist.get_rank()} is not in the group: pass the group that this rank is in.")
        return Ring(group.group_name, dist.get_world_size(group), rank)


class _Deterministic(AttentionArguments):
    """Terms whose kernels give the same bits at each run."""

    __slots__ = ()

    def block(self, piece: Piece, device: torch.device) -> Block:
        return replace(AttentionArguments.block(self, piece, device), is_deterministic=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens are: `spans` of each rank, documents that begin at `starts`, if any, and how keys travel."""

    spans: tuple[Spans, ...]
    ring: Ring
    starts: Starts | None = None
    heads_per_message: int | None = None  # None: round the ring, else gathered

    @property
    def length(self) -> int:
        """Tokens of all ranks."""
        return sum(span.size for spans in self.spans for span in spans)


def attend(q: Tensor, k: Tensor, v: Tensor, options: Options, place: Place) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of this rank's queries over the keys of all ranks; lse has no gradient.

    Args:
        q: `[B, H, tokens, D]`.
        k, v: `[B, K, tokens, D]`, H a multiple of K.
        options: what is computed.
        place: where the tokens are.
    """
    check(q, k, v, options)
    found: tuple[Tensor, Tensor] = _Attend.apply(q, k, v, terms_of(q, k, options, place), place)  # type: ignore[no-untyped-call]
    return found


def check(q: Tensor, k: Tensor, v: Tensor, options: Options) -> None:
    """Refuse tensors and options that do not fit, before anything is sent."""
    shapes = f"q, k and v are {', '.join(str([x.shape[0], x.shape[2], x.shape[1], x.shape[3]]) for x in (q, k, v))}"
    rows = {(x.shape[0], x.shape[2]) for x in (q, k, v)}
    if len(rows) > 1 or k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1] or q.shape[3] != k.shape[3]:
        raise InputError(
            f"{shapes} as [batch, tokens, heads, dim]: batch and tokens must be equal, the heads of q a multiple of "
            "those of k and v, the dims of q and k equal. Pass this rank's tokens of all three."
        )
    if len({x.dtype for x in (q, k, v)}) > 1:
        raise InputError(f"q, k and v are {', '.join(str(x.dtype) for x in (q, k, v))}: cast them to one dtype.")
    if not 0 <= options.dropout_p < 1:
        raise InputError(f"dropout_p is {options.dropout_p}: it must be at least 0 and below 1.")
    slopes = options.alibi_slopes
    if slopes is None:
        return
    if slopes.shape != (q.shape[1],):
        raise InputError(f"alibi_slopes is {list(slopes.shape)}: pass one slope a head, [{q.shape[1]}], for all rows.")
    if slopes.requires_grad:
        raise InputError("alibi_slopes has no gradient here: detach it.")


def terms_of(q: Tensor, k: Tensor, options: Options, place: Place) -> AttentionArguments:
    """Return what the runtime computes; for dropout the ranks agree on a seed."""
    left, right = options.window_size
    dropout, scale, slopes = options.dropout_p, options.softmax_scale, options.alibi_slopes
    seed = shared_seed(q.device, place.ring.size, place.ring.group) if dropout else None
    known = {
        "mask": None,
        "documents": None,
        "key_padding": None,
        "scale": q.shape[3] ** -0.5 if scale is None else scale,
        "is_causal": options.causal,
        "window": left + 1 if left >= 0 else 0,
        "softcap": 0.0,
        "dropout": dropout,
        "lookahead": max(right, -1),
        "bounds": None,
        "prefix": None,
        "slopes": None if slopes is None else slopes.float(),
        "sinks": None,
        "seed": seed,
    }
    kind = _Deterministic if options.deterministic else AttentionArguments
    terms = kind.of(q, k, tuple(known.values()), place.length)
    if place.starts is None:
        return terms
    return replace(terms, visible=replace(terms.visible, segments=Segments.of((place.starts,))))


class _Attend(torch.autograd.Function):
    """(q, k, v) -> (out, lse)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, terms: AttentionArguments, place: Place
    ) -> tuple[Tensor, Tensor]:
        if place.heads_per_message is None:
            out, lse = ring.attend(q, k, v, terms, place.spans, place.ring)
        else:
            out, lse = gather.attend(q, k, v, terms, place.spans, place.ring, place.heads_per_message)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.terms, ctx.place = terms, place
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        place: Place = ctx.place
        q, k, v, out, lse = ctx.saved_tensors
        arguments = (dout, q, k, v, out, lse, ctx.terms, place.spans, place.ring)
        if place.heads_per_message is None:
            grads = ring.attend_backward(*arguments)
        else:
            grads = gather.attend_backward(*arguments, place.heads_per_message)
        return *grads[:3], None, None
