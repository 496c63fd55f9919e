"""Joined and grouped tokens on gloo ranks against one device: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_joined_tokens import PROGRAMS
from tests.models import error, errors, gradients

EXACT = 1e-12  # float64


def run(rank: Any, name: str) -> dict[str, float]:
    torch._dynamo.reset()
    make, inputs, options = PROGRAMS[name]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
    model, alone = models
    given = inputs()
    cpcompile.apply(model, rank.mesh(), inner="eager", balancer="zig_zag", **options)
    losses = [m(**given) for m in (model, alone)]
    for loss in losses:
        loss.backward()
    return {"loss": error(losses[0].detach(), losses[1].detach())} | errors(gradients(model), gradients(alone))


@pytest.mark.filterwarnings("ignore:one graph for all lengths cannot be sharded")
@pytest.mark.parametrize(
    ("name", "world_size"),
    [("masked", 3), ("soft prompt", 2), ("class token", 3), ("merged", 2), ("patches", 2)],
)
def test_equals_one_device(pool: Any, name: str, world_size: int) -> None:
    for found in pool.run(world_size, run, name):
        assert max(found.values()) < EXACT, found
