"""Experts on gloo ranks: sorted and multiplied in groups on local tokens, compiled once for all lengths."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_token_local import moe, tokens
from tests.models import error, errors, gradients

FLOAT32 = 2e-5
LENGTHS = (19, 32, 41)


def train(rank: Any, inner: str) -> tuple[dict[str, float], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alone = moe("mixtral", "grouped_mm", num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=1.0)
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, balancer="zig_zag")
    found: dict[str, float] = {}
    for length in LENGTHS:
        losses, grads = [], []
        for each in (model, alone):
            loss = each(**tokens(length)).loss
            loss.backward()
            losses.append(loss.detach())
            grads.append(gradients(each))
        found |= {f"{name} at {length}": e for name, e in errors(*grads).items()} | {
            f"loss at {length}": error(*losses)
        }
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("world_size", "inner"), [pytest.param(2, "inductor", marks=pytest.mark.slow), (3, "aot_eager")]
)
def test_mixtral_trains_exactly(pool: Any, world_size: int, inner: str) -> None:
    for found, num_graphs in pool.run(world_size, train, inner, timeout=250):
        name = max(found, key=found.__getitem__)
        assert found[name] < FLOAT32, f"{name} is off by {found[name]:.1e}"
        assert num_graphs == 1, "one graph serves all lengths"
