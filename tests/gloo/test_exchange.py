"""Exchange of tokens on gloo ranks against the definitions that lockstep runs: values, and every gradient by plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpcompile.balance.layout import LAYOUTS, local_length
from cpcompile.inspect.definitions import COLLECTIVES

ops = torch.ops.cpcompile
Calls = list[tuple[str, tuple[Any, ...]]]

LENGTHS = (1, 5, 13, 16)
OUTER, INNER = 2, 3


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def local(rank: int, world_size: int, length: int, layout: str, inner: int = 1) -> torch.Tensor:
    """Return one rank's `[3, outer * local_length * inner, 2]`, padding slots included; not contiguous."""
    size = OUTER * local_length(length, world_size, layout) * inner
    return normal(2, size, 3, seed=rank + 10).permute(2, 1, 0).requires_grad_()


def moves(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    axis = (length, layout, world_size, group)
    x = local(rank, world_size, length, layout, INNER)
    return [
        ("move_tokens", (x, 1, INNER, sign, offset, wrap, 0.25, *axis))
        for sign in (1, -1)
        for wrap in (False, True)
        for offset in (0, 1, -2, length - 1, -length, 2 * length + 3)
    ]


def halos(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    axis = (length, layout, world_size, group)
    x = local(rank, world_size, length, layout)
    return [("halo_tokens", (x, 1, *widths, *axis)) for widths in ((0, 0), (3, 0), (0, 1), (2, 2), (length + 2, 7))]


def rearrangements(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    """Sequences of other lengths beside this one, in groups and alone; and ranges of them."""
    pairs = [
        ([length, 1, 4, 1], [length + 4, 1], 0),
        ([2, 3, length, 2], [2 * length + 6, 1], 0),
        ([6 * length, 1], [length, 6], 0),
        ([length, 2], [3, 1, 2 * length - 3, 1] if length > 1 else [2, 1], 0),
        ([length + 3, 1], [length, 1], 2),
        ([length, 1], [length + 3, 1], -2),
    ]
    calls: Calls = []
    for seed, (held, wanted, offset) in enumerate(pairs):
        slots = sum(local_length(n, world_size, layout) * k for n, k in zip(held[::2], held[1::2], strict=True))
        x = normal(2, OUTER * slots, 3, seed=10 * rank + seed).permute(2, 1, 0).requires_grad_()
        calls += [
            ("rearrange_tokens", (x, 1, held, wanted, offset, fills, layout, world_size, group))
            for fills in (True, False)
        ]
        calls.append(("arranged_positions", (x, wanted, layout, world_size)))
    documents = (torch.arange(length) >= length // 3).long() + (torch.arange(length) >= length // 2)
    bounds = ops.document_bounds(documents[None])
    for old, new in ((layout, "balanced"), ("balanced", layout), (layout, "contiguous")):
        x = normal(2, OUTER * local_length(length, world_size, old), 3, seed=rank).permute(2, 1, 0).requires_grad_()
        calls.append(
            ("rearrange_tokens", (x, 1, [length, 1], [length, 1], 0, True, old, world_size, group, new, bounds))
        )
    return calls


def picks(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    axis = (length, layout, world_size, group)
    x = local(rank, world_size, length, layout)
    calls: Calls = []
    for start, count in {(0, 1), (0, length), (length - 1, 1), (length // 3, (length + 1) // 2)}:
        values = normal(3, OUTER * count, 2, seed=rank).requires_grad_()
        calls += [("pick_tokens", (x, 1, start, count, *axis)), ("put_tokens", (x, values, 1, start, *axis))]
    return calls


def numbers(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    axis = (length, layout, world_size, group)
    x, index = normal(3, 2, seed=rank).requires_grad_(), torch.arange(-length, length).view(2, -1)
    return [
        ("local_slots", (index, *axis)),
        ("positions", (x, *axis)),
        ("chunk_indices", (x, *axis[1:])),
        ("stack_ranks", (x, *axis[2:])),
    ]


def exchanges(rank: int, length: int, layout: str, world_size: int, group: str) -> Calls:
    """Channels, fewer and more than ranks, and columns of as many tokens, before and behind the tokens."""
    calls: Calls = []
    for other in (1, 2, 7, length):
        for dim, to in ((1, 0), (0, 2)):
            shape = [3, 3, 3]
            shape[dim], shape[to] = local_length(length, world_size, layout), other
            x = normal(*shape, seed=rank + other).requires_grad_()
            calls.append(("exchange_dims", (x, dim, length, to, other, layout, world_size, group)))
    return calls


FAMILIES = {function.__name__: function for function in (moves, halos, rearrangements, picks, numbers, exchanges)}
Found = list[tuple[torch.Tensor, list[torch.Tensor]]]


def leaves(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    return [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]


def weights(out: torch.Tensor, rank: int) -> torch.Tensor:
    """Return what to weigh a rank's result with, its padding slots too."""
    return normal(*out.shape, seed=rank + 100)


def on_ranks(rank: Any, family: str, layout: str) -> Found:
    """Return the result of each call and the gradients of its operands, as this rank gets them."""
    found: Found = []
    for length in LENGTHS:
        for name, arguments in FAMILIES[family](rank.rank, length, layout, rank.world_size, rank.group):
            out = getattr(ops, name)(*arguments)
            grads: list[torch.Tensor] = []
            if out.requires_grad:
                grads = list(torch.autograd.grad(out, leaves(arguments), weights(out, rank.rank)))
            found.append((out.detach(), grads))
    return found


def by_definition(family: str, layout: str, world_size: int) -> list[Found]:
    """Return what `on_ranks` should, for each rank."""
    found: list[Found] = [[] for _ in range(world_size)]
    for length in LENGTHS:
        ranks = [FAMILIES[family](rank, length, layout, world_size, "") for rank in range(world_size)]
        for calls in zip(*ranks, strict=True):
            operator = getattr(ops, calls[0][0]).default
            names = [argument.name for argument in operator._schema.arguments]
            outs = COLLECTIVES[operator]([dict(zip(names, arguments, strict=False)) for _, arguments in calls])
            operands = [leaves(arguments) for _, arguments in calls]
            grads = [torch.zeros_like(x) for xs in operands for x in xs]
            if outs[0].requires_grad:
                loss = sum((out * weights(out, rank)).sum() for rank, out in enumerate(outs))
                grads = list(torch.autograd.grad(loss, [x for xs in operands for x in xs], materialize_grads=True))
            for rank, (out, xs) in enumerate(zip(outs, operands, strict=True)):
                own, grads = grads[: len(xs)], grads[len(xs) :]
                found[rank].append((out.detach(), own if out.requires_grad else []))
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_agree_with_the_definition(pool: Any, family: str, layout: str, world_size: int) -> None:
    expected = by_definition(family, layout, world_size)
    for found, wanted in zip(pool.run(world_size, on_ranks, family, layout), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def of_dtype(rank: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    length, axis = 13, (13, "zig_zag", rank.world_size, rank.group)
    x = ops.shard_tokens(tokens(length, dtype), 0, 1, *axis)
    moved = ops.move_tokens(x, 0, 1, 1, -1, False, 1.0, *axis)
    wide = ops.halo_tokens(x, 0, 2, 0, *axis)
    pairs = torch.stack([x, x])
    turned = ops.exchange_dims(pairs, 1, 13, 0, 2, *axis[1:])
    back = ops.exchange_dims(turned, 0, 2, 1, 13, *axis[1:])
    is_own = torch.stack([ops.stack_ranks(x, *axis[2:])[rank.rank] == x, *(back == pairs)[:, : len(x)]])
    return (ops.gather_tokens(moved, 0, 1, *axis), wide, is_own)


def tokens(length: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(length) * 5 % 7 - 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64])
def test_tokens_of_any_dtype_travel(pool: Any, dtype: torch.dtype) -> None:
    whole = tokens(13, dtype)
    for shifted, wide, is_own in pool.run(3, of_dtype, dtype):
        assert torch.equal(shifted, torch.cat([torch.ones(1, dtype=dtype), whole[:-1]]))
        assert wide.dtype == dtype and wide.shape == (2 * (3 + 2),)
        assert is_own.all()


def sent(rank: Any, length: int) -> list[list[int]]:
    """Return the elements that this rank sends to each rank, for each all-to-all of a shift by one, a flip and a halo."""
    import torch.distributed as dist

    axis = (length, "contiguous", rank.world_size, rank.group)
    x, sizes, real = torch.zeros(local_length(*axis[:1], rank.world_size, "contiguous"), 2), [], dist.all_to_all_single

    def recorded(output: Any, message: Any, received: Any, sending: list[int], **options: Any) -> Any:
        sizes.append(list(sending))
        return real(output, message, received, sending, **options)

    dist.all_to_all_single = recorded
    try:
        ops.move_tokens(x, 0, 1, 1, -1, False, 0.0, *axis)
        ops.move_tokens(x, 0, 1, -1, length - 1, False, 0.0, *axis)
        ops.halo_tokens(x, 0, 3, 0, *axis)
    finally:
        dist.all_to_all_single = real
    return sizes


def test_only_what_changes_rank_travels(pool: Any) -> None:
    ranks = pool.run(4, sent, 16)
    shift, flip, halo = ([rank[i] for rank in ranks] for i in range(3))
    to_next = [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert shift == [[2 * n for n in row] for row in to_next]
    assert halo == [[6 * n for n in row] for row in to_next]
    assert flip == [[0, 0, 0, 8], [0, 0, 8, 0], [0, 8, 0, 0], [8, 0, 0, 0]]


def out_of_range(rank: Any) -> None:
    for index in (8, -9):
        with pytest.raises(RuntimeError, match="an index is out of range for 8 tokens"):
            ops.local_slots(torch.tensor([0, index]), 8, "zig_zag", rank.world_size, rank.group)


def test_positions_outside_the_sequence_are_an_error(pool: Any) -> None:
    pool.run(2, out_of_range)
