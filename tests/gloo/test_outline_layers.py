"""Equal layers as calls of one function, on gloo ranks: exact beside checkpoints, frozen layers, documents and any length."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func

import cpcompile
from cpcompile.options.config import Config
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64
SHAPE = {"num_layers": 6}


def trained(rank: Any, num_frozen: int, options: dict[str, Any]) -> tuple[dict[str, float], list[int]]:
    """Errors of two backward passes of two lengths and of a call without gradients; how many calls each graph has."""
    torch._dynamo.reset()
    model, alone = make("rotary", **SHAPE), make("rotary", **SHAPE)
    for each in (model, alone):
        for block in each.blocks[:num_frozen]:
            block.requires_grad_(False)
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", **options)
    num_calls = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        num_calls.append(len(gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.invoke_subgraph)))
        return make_boxed_func(gm)

    found: dict[str, float] = {}
    # Inductor takes minutes where this takes seconds; the graphs are the same.
    with (
        unittest.mock.patch.object(Config, "outlines", True),
        unittest.mock.patch("torch._functorch.compilers.nop", compiler),
    ):
        for seed, length in enumerate((29, 35)):
            inputs = batch(alone, length, seed=seed)
            losses = [loss_of(each(**inputs)) for each in (model, alone)]
            for loss in losses:
                loss.backward()
            found[f"loss {length}"] = error(losses[0].detach(), losses[1].detach())
        with torch.no_grad():
            found["without gradients"] = error(*(loss_of(each(**inputs)) for each in (model, alone)))
    return found | errors(gradients(model), gradients(alone)), num_calls


@pytest.mark.parametrize(
    ("world_size", "num_frozen", "options"),
    [
        (2, 0, {"strategy": "ring"}),
        (3, 0, {"strategy": "ulysses", "memory_budget": 0.0}),
        pytest.param(2, 0, {"strategy": "ulysses", "dynamic": False}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"strategy": "ring", "memory_budget": 0.0}, marks=pytest.mark.slow),
        (1, 2, {"strategy": "ring"}),
    ],
)
def test_trains_exactly(pool: Any, world_size: int, num_frozen: int, options: dict[str, Any]) -> None:
    for found, num_calls in pool.run(world_size, trained, num_frozen, options, timeout=250):
        assert max(found.values()) < EXACT, found
        assert min(num_calls) == SHAPE["num_layers"] - num_frozen, num_calls
