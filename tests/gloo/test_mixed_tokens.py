"""Long convolutions, pairs and experts in a loop on gloo ranks: loss and gradients are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import cpcompile
from tests.graph import test_fourier, test_pairs, test_picked_rows
from tests.models import error, errors, gradients

FLOAT64 = 1e-10
LENGTHS = (9, 14)


def model_of(name: str) -> nn.Module:
    modules = {"Mixed": test_fourier, "Paired": test_pairs, "Mixture": test_picked_rows}
    kind, _, function = name.partition(".")
    return getattr(modules[kind], kind)(getattr(modules[kind], function)).double()  # type: ignore[no-any-return]


def train(rank: Any, name: str, inner: str) -> tuple[dict[str, float], int]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alone = model_of(name)
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, balancer="zig_zag")
    found: dict[str, float] = {}
    for length in LENGTHS:
        losses, grads = [], []
        for each in (model, alone):
            loss = each(**test_fourier.ids(length))
            loss.backward()
            losses.append(loss.detach())
            grads.append(gradients(each))
        found |= {f"{key} at {length}": e for key, e in errors(*grads).items()}
        found |= {f"loss at {length}": error(*losses)}
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("Mixed.hyena", "aot_eager"),
        ("Mixed.fnet_in_one", "eager"),
        ("Paired.triangle_of_rows", "eager"),
        ("Paired.symmetric", "eager"),
        ("Mixture.where_of_routes", "aot_eager"),
        ("Mixture.mask_of_repeated_rows", "eager"),
        pytest.param("Mixed.hyena", "inductor", marks=pytest.mark.slow),
        pytest.param("Paired.triangle_of_rows", "inductor", marks=pytest.mark.slow),
        pytest.param("Mixture.where_of_routes", "inductor", marks=pytest.mark.slow),
    ],
)
def test_trains_exactly(pool: Any, name: str, inner: str) -> None:
    for found, num_graphs in pool.run(3, train, name, inner, timeout=250):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < FLOAT64, f"{worst} is off by {found[worst]:.1e}"
        assert num_graphs == 1, "one graph serves all lengths"
