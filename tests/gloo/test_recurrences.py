"""Chunks that pass on their states, and loops, on gloo ranks: loss and gradients are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_scans import GatedDelta, Model, Selective, StateSpace, text
from tests.models import error, errors, gradients

FLOAT64 = 1e-10
MIXERS = {"state space": StateSpace, "gated delta": GatedDelta, "loop": Selective}


def train(rank: Any, mixer: str, inner: str, layout: str) -> dict[str, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    alone, inputs = Model(MIXERS[mixer]()).double(), text(7 if mixer == "loop" else 26)
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, balancer=layout, dynamic=False)
    losses, grads = [], []
    for each in (model, alone):
        loss = each(**inputs)
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(each))
    return {"loss": error(*losses), **errors(*grads)}


@pytest.mark.parametrize(
    ("mixer", "inner", "layout"),
    [
        ("state space", "eager", "zig_zag"),
        ("gated delta", "eager", "contiguous"),
        pytest.param("state space", "aot_eager", "contiguous", marks=pytest.mark.slow),
        pytest.param("gated delta", "inductor", "zig_zag", marks=pytest.mark.slow),
        pytest.param("state space", "inductor", "contiguous", marks=pytest.mark.slow),
        pytest.param("loop", "aot_eager", "zig_zag", marks=pytest.mark.slow),
    ],
)
def test_trains_exactly(pool: Any, mixer: str, inner: str, layout: str) -> None:
    for found in pool.run(3, train, mixer, inner, layout, timeout=250):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < FLOAT64, f"{worst} is off by {found[worst]:.1e}"
