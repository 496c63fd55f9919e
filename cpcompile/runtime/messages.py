"""Messages: tensors laid end to end, tokens first, so that a run of tokens is one run of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cpcompile.runtime.post import Ring, new_message
from cpcompile.runtime.schedule import Span

Tensor = torch.Tensor


def by_token(tensors: Sequence[Tensor], ring: Ring, largest: int | None = None) -> Tensor:
    """Lay tensors `[B, K, tokens, D]` end to end in a message, each as `[tokens, B, K, D]`; `largest`: see `new_message`."""
    sizes = [x.numel() for x in tensors]
    message = new_message(sum(sizes), tensors[0], ring, largest)
    for part, x in zip(torch.split(message, sizes), tensors, strict=True):
        by_tokens = tokens_first(x)
        part.view(by_tokens.shape).copy_(by_tokens)
    return message


def runs(spans: Iterable[Span], tensors: Sequence[Tensor], num_slots: int) -> list[slice]:
    """Return where a message `by_token` holds the tokens of `spans`.

    Args:
        spans: the tokens, by their slots.
        tensors: like those in the message; only batch, heads and dim are read.
        num_slots: the tokens of each tensor in the message.
    """
    found, start = [], 0
    for x in tensors:
        token = x.shape[0] * x.shape[1] * x.shape[3]
        found += [slice(start + s.slot * token, start + (s.slot + s.size) * token) for s in spans]
        start += num_slots * token
    return found


def room(num_tokens: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return empty tensors `[tokens, B, K, D]` for what is fetched."""
    return [x.new_empty(num_tokens, *x.shape[:2], x.shape[3]) for x in like]


def tokens_first(x: Tensor) -> Tensor:
    """Return `[B, K, tokens, D]` as `[tokens, B, K, D]`."""
    return x.permute(2, 0, 1, 3)


def by_head(x: Tensor) -> Tensor:
    """Return `[tokens, B, K, D]` as `[B, K, tokens, D]`."""
    return x.permute(1, 2, 0, 3)
