"""Moves: which runs of tokens go from the slots of one rank to those of another, by arithmetic over the layout alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cpcompile.balance.token_spans import Span
from cpcompile.runtime.transport import process_group

Spans = Sequence[Span]


@dataclass(frozen=True, slots=True)
class Move:
    """`size` consecutive slots go to `size` consecutive slots, in the other direction if `is_reversed`."""

    source: int
    target: int
    size: int
    is_reversed: bool = False

    def read(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return the tokens of `x` that move, in the order in which they arrive."""
        tokens = x.narrow(dim, self.source, self.size)
        return tokens.flip(dim) if self.is_reversed else tokens

    def write(self, tokens: torch.Tensor, result: torch.Tensor, dim: int, is_sum: bool) -> None:
        """Put the tokens into `result`, or add them to what is there."""
        slots = result.narrow(dim, self.target, self.size)
        if is_sum:
            slots.add_(tokens)
        else:
            slots.copy_(tokens)


@dataclass(frozen=True, slots=True)
class Route:
    """Position p of the targets takes, for each of the offsets, position `sign * p + offset` of the sources, if there."""

    sign: int = 1
    offsets: tuple[int, ...] = (0,)

    def moves(self, sources: Spans, targets: Spans) -> Iterator[Move]:
        """Yield what moves; both sides of an exchange find it in the same order."""
        for target in targets:
            for source in sources:
                for offset in self.offsets:
                    start = source.position - offset if self.sign > 0 else offset - source.end + 1
                    part = target.between(start, start + source.size)
                    if part.size:
                        first = part.position + offset if self.sign > 0 else offset - part.end + 1
                        yield Move(source.slot + first - source.position, part.slot, part.size, self.sign < 0)


def move_within(x: torch.Tensor, result: torch.Tensor, dim: int, sources: Spans, targets: Spans) -> torch.Tensor:
    """Copy the tokens that both sides have from `x` to `result`, which is returned."""
    for move in Route().moves(sources, targets):
        move.write(move.read(x, dim), result, dim, is_sum=False)
    return result


def exchange(
    x: torch.Tensor,
    result: torch.Tensor,
    dim: int,
    sources: Sequence[Spans],
    targets: Sequence[Spans],
    route: Route,
    group: str,
    *,
    is_sum: bool = False,
) -> torch.Tensor:
    """Write what the route brings from the ranks' `x` into this rank's `result`, which is returned.

    `sources` and `targets` have the spans of each rank. Tokens that stay on their rank are copied; the others
    travel in one all-to-all, in which a pair of ranks sends no more than those.
    """
    world_size = len(sources)
    rank = process_group.rank_in(world_size, group)
    outgoing = [list(route.moves(sources[rank], spans)) for spans in targets]
    incoming = [list(route.moves(spans, targets[rank])) for spans in sources]
    for move in outgoing[rank]:
        move.write(move.read(x, dim), result, dim, is_sum)
    outgoing[rank] = incoming[rank] = []
    if world_size == 1:
        return result
    shapes = [[(*x.shape[:dim], move.size, *x.shape[dim + 1 :]) for move in moves] for moves in incoming]
    messages = [
        process_group.pack([move.read(x, dim) for move in moves]) if moves else x.new_empty(0) for moves in outgoing
    ]
    sizes = [sum(torch.Size(shape).numel() for shape in parts) for parts in shapes]
    for moves, parts, message in zip(
        incoming, shapes, process_group.all_to_all(messages, sizes, world_size, group), strict=True
    ):
        for move, tokens in zip(moves, process_group.unpack(message, parts), strict=True):
            move.write(tokens, result, dim, is_sum)
    return result


def most_sent(sources: Sequence[Spans], targets: Sequence[Spans], route: Route) -> tuple[int, int]:
    """Return the most tokens that any rank sends to others, and the most that any receives."""
    ranks = range(len(sources))
    sizes = [
        [sum(move.size for move in route.moves(sources[a], targets[b])) if a != b else 0 for b in ranks] for a in ranks
    ]
    return max(map(sum, sizes)), max(map(sum, zip(*sizes, strict=True)))
