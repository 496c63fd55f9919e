"""Messages: tensors laid end to end, tokens first, so that a run of tokens is one run of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cpcompile.balance.token_spans import Span
from cpcompile.runtime.transport.copies import copy_
from cpcompile.runtime.transport.post import Ring, new_message

Tensor = torch.Tensor


def by_token(tensors: Sequence[Tensor], ring: Ring, largest: int | None = None) -> Tensor:
    """Lay tensors `[B, K, tokens, D]` end to end in a message, each as `[tokens, B, K, D]`; `largest`: see `new_message`."""
    message, start = new_message(sum(x.numel() for x in tensors), tensors[0], ring, largest), 0
    for x in tensors:
        start = lay(tokens_first(x), message, start)
    return message


def lay(x: Tensor, message: Tensor, start: int) -> int:
    """Copy a tensor into a message and return where the next one begins."""
    end = start + x.numel()
    copy_(message[start:end].view(x.shape), x)
    return end


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
