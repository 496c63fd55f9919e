"""Messages: tensors laid end to end, tokens first, so that a run of tokens is one run of memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch

from cpcompile.balance.token_spans import Span
from cpcompile.runtime.transport.copies import Copies, Kind, Pair, kind_of, like
from cpcompile.runtime.transport.post import Ring, new_message

Tensor = torch.Tensor


def by_token(tensors: Sequence[Tensor], ring: Ring, largest: int | None = None) -> Tensor:
    """Lay tensors `[B, K, tokens, D]` end to end in a message, each as `[tokens, B, K, D]`; `largest`: see `new_message`."""
    message = new_message(sum(x.numel() for x in tensors), tensors[0], ring, largest)
    _laying(tuple(map(kind_of, tensors))).make((*tensors, message))
    return message


@lru_cache(maxsize=256)
def _laying(kinds: tuple[Kind, ...]) -> Copies:
    """Return the copies that lay tensors of some kinds in a message."""
    tensors = [*map(like, kinds)]
    message, start, pairs = tensors[0].new_empty(sum(x.numel() for x in tensors)), 0, list[Pair]()
    for number, x in enumerate(tensors):
        end = start + x.numel()
        pairs.append((len(tensors), message[start:end].view(tokens_first(x).shape), number, tokens_first(x)))
        start = end
    return Copies.of(pairs, [*tensors, message])


def runs(spans: Iterable[Span], tensors: Sequence[Tensor], num_slots: int) -> tuple[slice, ...]:
    """Return where a message `by_token` holds the tokens of `spans`.

    Args:
        spans: the tokens, by their slots.
        tensors: like those in the message; only batch, heads and dim are read.
        num_slots: the tokens of each tensor in the message.
    """
    return _runs(tuple(spans), tuple(map(_token, tensors)), num_slots)


@lru_cache(maxsize=4096)
def _runs(spans: tuple[Span, ...], widths: tuple[int, ...], num_slots: int) -> tuple[slice, ...]:
    found, start = list[slice](), 0
    for width in widths:
        found += [slice(start + s.slot * width, start + (s.slot + s.size) * width) for s in spans]
        start += num_slots * width
    return tuple(found)


def _token(x: Tensor) -> int:
    """Return how many elements a token has."""
    return x.shape[0] * x.shape[1] * x.shape[3]


def room(num_tokens: int, like: Sequence[Tensor]) -> list[Tensor]:
    """Return empty tensors `[tokens, B, K, D]` for what is fetched."""
    return [x.new_empty(num_tokens, *x.shape[:2], x.shape[3]) for x in like]


def parts_of(rooms: Sequence[Tensor], spans: Sequence[Span]) -> list[Tensor]:
    """Return the flat parts of what `room` returned that `spans` are laid in, one after the other from the first slot on."""
    if not spans:
        return []
    flat = [x.view(-1) for x in rooms]
    if len(spans) == 1:
        return flat
    tokens = map(_token, map(by_head, rooms))
    sizes = [[span.size * token for span in spans] for token in tokens]
    return [part for x, each in zip(flat, sizes, strict=True) for part in x.split_with_sizes(each)]


def tokens_first(x: Tensor) -> Tensor:
    """Return `[B, K, tokens, D]` as `[tokens, B, K, D]`."""
    return x.permute(2, 0, 1, 3)


def by_head(x: Tensor) -> Tensor:
    """Return `[tokens, B, K, D]` as `[B, K, tokens, D]`."""
    return x.permute(1, 2, 0, 3)
