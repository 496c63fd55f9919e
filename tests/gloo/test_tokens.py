"""Tokens and reductions on gloo ranks: values, and adjoints by <A x, y> summed over ranks = <x, A' y>."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.balance.layout import LAYOUTS, local_length, positions

ops = torch.ops.cpcompile
LENGTHS = (1, 5, 31, 64)
OUTER, INNER = 3, 2


def whole_tensor(length: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return `[4, outer * length * inner, 5]`."""
    torch.manual_seed(length)
    return (torch.randn(4, OUTER * length * INNER, 5, dtype=torch.float64) * 9).to(dtype)


def shard_and_gather(rank: Any, layout: str, dtype: torch.dtype) -> list[torch.Tensor]:
    results = []
    for length in LENGTHS:
        where = (1, INNER, length, layout, rank.world_size, rank.group)
        mine = ops.shard_tokens(whole_tensor(length, dtype), *where)
        results += [mine, ops.gather_tokens(mine, *where)]
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_restores_what_shard_cut(pool: Any, layout: str, world_size: int, dtype: torch.dtype) -> None:
    for rank, results in enumerate(pool.run(world_size, shard_and_gather, layout, dtype)):
        for length, mine, gathered in zip(LENGTHS, results[::2], results[1::2], strict=True):
            x = whole_tensor(length, dtype)
            at = positions(length, rank, world_size, layout).clamp(max=length - 1)
            expected = x.view(4, OUTER, length, INNER, 5)[:, :, at].reshape(4, -1, 5)
            assert torch.equal(mine, expected)
            assert torch.equal(gathered, x)


def adjoints(rank: Any, layout: str) -> list[tuple[float, ...]]:
    """Return, for each length, this rank's <A x, y> and <x, A' y> of shard, gather and fill."""
    products = []
    for length in LENGTHS:
        where = (length, layout, rank.world_size, rank.group)
        x = whole_tensor(length).requires_grad_()
        torch.manual_seed(rank.rank + 1)
        shape = (4, OUTER * local_length(length, rank.world_size, layout) * INNER, 5)
        mine = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        row: list[float] = []
        for out, leaf in (
            (ops.shard_tokens(x, 1, INNER, *where), x),
            (ops.gather_tokens(mine, 1, INNER, *where), mine),
            (ops.fill_padding(mine, 1, INNER, 0.0, 0, 0, *where), mine),
        ):
            y = torch.randn_like(out)
            (grad,) = torch.autograd.grad(out, leaf, y)
            row += [(out * y).sum().item(), (leaf * grad).sum().item()]
        products.append(tuple(row))
    return products


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward_is_the_adjoint(pool: Any, layout: str, world_size: int) -> None:
    for rows in zip(*pool.run(world_size, adjoints, layout), strict=True):
        totals = [sum(column) for column in zip(*rows, strict=True)]
        for forward, backward in zip(totals[::2], totals[1::2], strict=True):
            assert forward == pytest.approx(backward, rel=1e-12)


def filled(rank: Any, layout: str) -> list[torch.Tensor]:
    where = (layout, rank.world_size, rank.group)
    sizes = {length: 2 * local_length(length, rank.world_size, layout) for length in LENGTHS}
    return [
        ops.fill_padding(torch.zeros(size, dtype=torch.int64), 0, 1, -100.0, 0, 0, length, *where)
        for length, size in sizes.items()
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fill_padding_marks_the_padding_only(pool: Any, layout: str) -> None:
    for rank, results in enumerate(pool.run(4, filled, layout)):
        for length, result in zip(LENGTHS, results, strict=True):
            is_padding = positions(length, rank, 4, layout) >= length
            assert torch.equal(result, torch.where(is_padding, -100, 0).repeat(2))


def reduced(rank: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.arange(6, dtype=torch.float64).view(2, 3).t().mul(rank.rank + 1).requires_grad_()
    total = ops.all_reduce(x, rank.world_size, rank.group)
    (grad,) = torch.autograd.grad(total, x, torch.full((3, 2), rank.rank + 1.0, dtype=torch.float64))
    return total.detach(), grad, ops.all_reduce(torch.tensor(rank.rank), rank.world_size, rank.group)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_all_reduce_sums_values_and_gradients(pool: Any, world_size: int) -> None:
    ranks = sum(range(1, world_size + 1))
    for total, grad, number in pool.run(world_size, reduced):
        assert torch.equal(total, torch.arange(6, dtype=torch.float64).view(2, 3).t() * ranks)
        assert torch.equal(grad, torch.full((3, 2), float(ranks), dtype=torch.float64))
        assert number == ranks - world_size


def raises_on_rank_1(rank: Any) -> None:
    if rank.rank == 1:
        raise KeyError("told to fail")
    ops.all_reduce(torch.ones(1), rank.world_size, rank.group)


def test_the_pool_shows_the_traceback_and_recovers(pool: Any) -> None:
    with pytest.raises(AssertionError, match=r"rank 1:(.|\n)*told to fail"):
        pool.run(2, raises_on_rank_1)
    assert len(pool.run(2, reduced)) == 2
