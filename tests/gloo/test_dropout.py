"""Dropout on gloo ranks: the same elements are dropped for every number of ranks, layout, seeding, compiler and checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import cpcompile
from cpcompile.balance.layout import LAYOUTS
from cpcompile.balance.token_order import TokenOrder
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.slices import join, split
from cpcompile.ir.placement import Sharded
from tests.models import VOCABULARY, batch, error, errors, gradients

ops = torch.ops.cpcompile
EXACT = 1e-12
INNERS = ("aot_eager", "inductor")


class DroppedLM(nn.Module):
    """Drops tokens' values, whole features, and parts of a parameter that every rank holds whole."""

    def __init__(self, is_checkpointed: bool = False, width: int = 12) -> None:
        super().__init__()
        self.is_checkpointed = is_checkpointed
        self.embed = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, VOCABULARY)

    def layer(self, x: Tensor, linear: nn.Module) -> Tensor:
        h = F.dropout(F.gelu(linear(x)), 0.4).unflatten(-1, (2, -1)).transpose(1, 2)
        h = F.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2).flatten(-2)
        return x + F.dropout(h, 0.3) + F.dropout(self.bias, 0.5)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = F.dropout1d(F.dropout(self.embed(input_ids), 0.2), 0.25)
        for linear in self.layers:
            x = (
                checkpoint(self.layer, x, linear, use_reentrant=False)
                if self.is_checkpointed
                else self.layer(x, linear)
            )
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def fresh(is_checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return DroppedLM(is_checkpointed).double()


def two_steps(model: nn.Module, seed: int, length: int) -> dict[str, Tensor]:
    """Return losses and gradients of two steps; the second draws what comes next."""
    torch.manual_seed(seed)
    found = {}
    for i in range(2):
        loss = model(**batch(model, length))
        loss.backward()
        found |= {f"{name} {i}": grad for name, grad in gradients(model).items()} | {f"loss {i}": loss.detach()}
    return found


def train(rank: Any, length: int, seed_step: int, is_checkpointed: bool, options: dict[str, Any]) -> dict[str, Tensor]:
    torch._dynamo.reset()
    model = cpcompile.apply(fresh(is_checkpointed), rank.mesh(), **{"inner": "eager"} | options)
    return two_steps(model, seed_step * rank.rank, length)


def untouched(rank: Any, length: int) -> dict[str, Tensor]:
    return two_steps(fresh(), 0, length)


def assert_same(results: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float = EXACT) -> None:
    for rank, found in enumerate(results):
        wrong = {name: e for name, e in errors(found, expected).items() if not e < tolerance}
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.fixture(scope="module")
def on_one_rank(pool: Any) -> dict[str, Tensor]:
    """What one rank computes by default, from the seed 0."""
    (found,) = pool.run(1, train, 31, 0, False, {})
    assert error(found["loss 1"], found["loss 0"]) > 1e-3, "each step draws anew"
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_and_layout_and_their_seeds_do_not_matter(
    pool: Any, on_one_rank: dict[str, Tensor], layout: str, world_size: int
) -> None:
    assert_same(pool.run(world_size, train, 31, 7, False, {"balancer": layout}), on_one_rank)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_compiler_and_checkpoint_do_not_matter(
    pool: Any, on_one_rank: dict[str, Tensor], inner: str, is_checkpointed: bool
) -> None:
    assert_same(pool.run(2, train, 31, 7, is_checkpointed, {"inner": inner}, timeout=200), on_one_rank)


@pytest.fixture(scope="module")
def on_one_device(pool: Any) -> dict[str, Tensor]:
    """What the untouched model computes from the seed 0."""
    return pool.run(1, untouched, 31)[0]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_exact_dropout_is_that_of_one_device(
    pool: Any, on_one_device: dict[str, Tensor], layout: str, world_size: int
) -> None:
    options = {"exact_dropout": True, "balancer": layout}
    assert_same(pool.run(world_size, train, 31, 0, False, options), on_one_device)


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_exact_dropout_with_every_compiler_and_checkpoint(
    pool: Any, on_one_device: dict[str, Tensor], inner: str, is_checkpointed: bool
) -> None:
    options = {"exact_dropout": True, "inner": inner}
    assert_same(pool.run(2, train, 31, 0, is_checkpointed, options, timeout=200), on_one_device)


def refusal(rank: Any, options: dict[str, Any]) -> str:
    try:
        train(rank, 31, 7, False, options)
    except cpcompile.InputError as found:
        return str(found)
    return ""


@pytest.mark.parametrize("check", ["always", "first", "never"])
def test_exact_dropout_needs_ranks_that_are_seeded_alike(pool: Any, check: str) -> None:
    for text in pool.run(2, refusal, {"exact_dropout": True, "check_inputs": check}):
        assert ("generators of the ranks are in different states" in text) == (check != "never")
        assert ("torch.manual_seed with the same seed on every rank" in text) == (check != "never")


class Noisy(DroppedLM):
    """Adds noise to a parameter that every rank holds whole."""

    def layer(self, x: Tensor, linear: nn.Module) -> Tensor:
        return linear(x) + self.bias + torch.rand_like(self.bias)


def noisy_losses(rank: Any, seed_step: int) -> list[Tensor] | str:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = cpcompile.apply(Noisy().double(), rank.mesh(), inner="eager")
    torch.manual_seed(seed_step * rank.rank)
    try:
        return [model(**batch(model, 31)).detach()]
    except cpcompile.InputError as found:
        return str(found)


def test_other_random_numbers_for_whole_values_need_ranks_that_are_seeded_alike(pool: Any) -> None:
    (first,), (second,) = pool.run(2, noisy_losses, 0)
    assert torch.equal(first, second)
    for text in pool.run(2, noisy_losses, 7):
        assert "generators of the ranks are in different states" in text


SHAPES = {(1, 1): (2, 3 * 11, 5), (1, 2): (2, 3 * 11 * 2, 5), (0, 1): (11, 4), (2, 1): (3, 2, 11)}


def arguments(at: Sharded, rank: Any, layout: str) -> list[dict[str, Any]]:
    """Return the arguments of each rank's dropout of the same whole tensor."""
    x = torch.randn(SHAPES[at.dim, at.inner], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shared = {"seed": torch.tensor(-123456789), "site": 3, "p": 0.3, "dim": at.dim, "inner": at.inner, "length": 11}
    axis = {"layout": layout, "world_size": rank.world_size, "group": rank.group}
    return [{"x": part, **shared, **axis} for part in split(x, at, TokenOrder(11, rank.world_size, layout))]


def dropped(rank: Any, layout: str) -> list[tuple[Tensor, Tensor]]:
    """Return the results of the operator and of its definition, of all ranks joined."""
    found = []
    for dim, inner in SHAPES:
        calls = arguments(Sharded(dim, inner), rank, layout)
        mine = ops.dropout_tokens(**calls[rank.rank])
        found.append(
            (
                mine,
                join(
                    COLLECTIVES[ops.dropout_tokens.default](calls),
                    Sharded(dim, inner),
                    TokenOrder(11, rank.world_size, layout),
                ),
            )
        )
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_operator_is_its_definition(pool: Any, layout: str, world_size: int) -> None:
    for (dim, inner), *ranks in zip(SHAPES, *pool.run(world_size, dropped, layout), strict=True):
        whole = join([mine for mine, _ in ranks], Sharded(dim, inner), TokenOrder(11, world_size, layout))
        for _, expected in ranks:
            assert torch.equal(whole == 0, expected == 0)
            assert torch.allclose(whole, expected, rtol=1e-14, atol=0)


def seeds(rank: Any) -> list[int]:
    torch.manual_seed(rank.rank)
    return [int(ops.shared_seed(torch.device("cpu"), rank.world_size, rank.group)) for _ in range(3)]


def test_shared_seed_is_that_of_the_first_rank(pool: Any) -> None:
    (alone,) = pool.run(1, seeds)
    assert len(set(alone)) == 3
    assert pool.run(3, seeds) == [alone] * 3
