"""Chunks that pass on their states, and loops, on gloo ranks: loss and gradients are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_scans import GatedDelta, KeepsState, Model, Selective, StateSpace, text
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


def keep_state(rank: Any, is_bounded: bool, layout: str) -> dict[str, float]:
    """Train two steps, of which the second begins with the state that the first one left on the module."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    alone, inputs, found = Model(KeepsState(is_bounded)).double(), text(8), {}
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner="eager", balancer=layout, dynamic=False)
    for step in range(2):
        losses = [each(**inputs) for each in (model, alone)]
        states = [each.mixer.state for each in (model, alone)]
        for each, loss, state in zip((model, alone), losses, states, strict=True):
            (loss + state.square().sum()).backward()
            each.mixer.state = state.detach()
        found |= {f"loss {step}": error(*losses), f"state {step}": error(*states)}
        found |= {f"{name} {step}": x for name, x in errors(*map(gradients, (model, alone))).items()}
    return found


@pytest.mark.parametrize(("is_bounded", "layout"), [(False, "zig_zag"), (True, "contiguous")])
def test_every_rank_keeps_the_state_of_one_device(pool: Any, is_bounded: bool, layout: str) -> None:
    """Also where a state has as many elements along a dim as there are tokens."""
    for found in pool.run(3, keep_state, is_bounded, layout):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < FLOAT64, f"{worst} is off by {found[worst]:.1e}"
