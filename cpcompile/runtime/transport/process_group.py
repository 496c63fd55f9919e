"""Process group: the only place where the runtime touches a process group. Nothing is sent when there is one rank."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist

from cpcompile._torch import resolve_group

# torch 2.13 renamed both and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def rank_in(world_size: int, group: str) -> int:
    """Return this process's rank in the group. Read when an operator runs, so that all ranks share one graph."""
    return 0 if world_size == 1 else dist.get_rank(resolve_group(group))


def pack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Lay tensors of one dtype end to end in one new flat message."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(
            f"one message needs one dtype, got {', '.join(str(t.dtype) for t in tensors)}: cast q, k and v alike"
        )
    message = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    for part, tensor in zip(unpack(message, [tensor.shape for tensor in tensors]), tensors, strict=True):
        part.copy_(tensor)
    return message


def unpack(message: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return views of a message that `pack` made of tensors with these shapes."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    ends = list(accumulate(sizes))
    return [message[end - size : end].view(*shape) for size, end, shape in zip(sizes, ends, shapes, strict=True)]


def all_gather(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return every rank's `x`, stacked: `[world_size, *x.shape]`."""
    if world_size == 1:
        return x.unsqueeze(0)
    stacked = x.new_empty(world_size * x.numel())
    _all_gather(stacked, x.contiguous().view(-1), group=resolve_group(group))
    return stacked.view(world_size, *x.shape)


def reduce_scatter(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return the sum over ranks of their `x[rank]`, for `x` `[world_size, ...]`."""
    if world_size == 1:
        return x[0]
    reduced = x.new_empty(x[0].numel())
    _reduce_scatter(reduced, x.contiguous().view(-1), group=resolve_group(group))
    return reduced.view(x.shape[1:])


def all_to_all(
    messages: Sequence[torch.Tensor], received: Sequence[int], world_size: int, group: str
) -> list[torch.Tensor]:
    """Send the flat `messages[r]` to rank r; return what each rank sent here, `received[r]` elements from rank r."""
    if world_size == 1:
        return list(messages)
    buffer = messages[0].new_empty(sum(received))
    sent = [message.numel() for message in messages]
    dist.all_to_all_single(buffer, torch.cat(list(messages)), list(received), sent, group=resolve_group(group))
    return list(torch.split(buffer, list(received)))


def all_reduce(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Return the sum of `x` over the ranks, as a new contiguous tensor."""
    total = x.clone(memory_format=torch.contiguous_format)
    if world_size > 1:
        dist.all_reduce(total, group=resolve_group(group))
    return total


def broadcast(x: torch.Tensor, world_size: int, group: str) -> torch.Tensor:
    """Overwrite `x` with that of the group's first rank, and return it."""
    if world_size > 1:
        dist.broadcast(x, group=resolve_group(group), group_src=0)
    return x
