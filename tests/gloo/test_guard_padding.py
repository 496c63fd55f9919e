"""On gloo ranks, gradients are those of one device where a model is not finite for the zeros that padding slots hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile
from tests.models import errors, gradients
from tests.undefined import STEPS, Rows, ids

EXACT = 1e-12  # float64
# Each fills padding slots in another way.
CASES = [
    ("embedding", 3, "contiguous"),
    ("roll", 2, "contiguous"),
    ("causal_attention", 3, "zig_zag"),
    ("attention", 4, "contiguous"),
    ("causal_convolution", 4, "zig_zag"),
    ("joined", 2, "zig_zag"),
    ("looked_up", 3, "contiguous"),
    ("token_local", 3, "zig_zag"),
]


def trained(rank: Any, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Errors of the loss and of the gradients at a length that no number of ranks divides."""
    torch._dynamo.reset()
    step = next(step for step in STEPS if step.__name__ == name)
    alone, model = Rows(step).double(), Rows(step).double()
    loss = alone(ids(11))
    loss.backward()
    cpcompile.apply(model, rank.mesh(), inner="eager", **options)
    found = model(ids(11))
    found.backward()
    return errors({"loss": found.detach(), **gradients(model)}, {"loss": loss.detach(), **gradients(alone)})


def assert_exact(results: list[dict[str, float]]) -> None:
    for rank, found in enumerate(results):
        assert max(found.values()) < EXACT, (rank, found)


@pytest.mark.parametrize(("name", "world_size", "balancer"), CASES)
def test_gradients_of_ranks_are_those_of_one_device(pool: Any, name: str, world_size: int, balancer: str) -> None:
    assert_exact(pool.run(world_size, trained, name, {"balancer": balancer}))


@pytest.mark.parametrize("strategy", ["ring", "gather", "ulysses"])
def test_no_strategy_leaves_padding_unset(pool: Any, strategy: str) -> None:
    assert_exact(pool.run(2, trained, "attention", {"balancer": "contiguous", "strategy": strategy}))
