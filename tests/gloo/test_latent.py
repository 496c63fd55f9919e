"""Keys and values of a latent that was gathered, on gloo ranks: loss, every gradient, and what is kept for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_gather_latents import HEADS, NOPE, RANK, ROPE, VALUE, Deep
from tests.models import error, errors, gradients

LENGTH = 13


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 13, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def train(rank: Any, inner: str, layout: str) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """Return the errors of loss and gradients, and the shapes that are kept for backward."""
    torch._dynamo.reset()
    alone = Deep().double()
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, strategy="latent", balancer=layout)
    shapes: list[tuple[int, ...]] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(map(int, x.shape)))
        return x

    model(**inputs())  # compiles, which keeps tensors of its own
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(**inputs())
    loss.backward()
    expected = alone(**inputs())
    expected.backward()
    found = {"loss": error(loss.detach(), expected.detach())} | errors(gradients(model), gradients(alone))
    return found, shapes


@pytest.mark.parametrize(("world_size", "inner", "layout"), [(2, "eager", "contiguous"), (3, "aot_eager", "zig_zag")])
def test_loss_and_gradients_are_exact(pool: Any, world_size: int, inner: str, layout: str) -> None:
    for found, shapes in pool.run(world_size, train, inner, layout):
        name = max(found, key=found.__getitem__)
        assert found[name] < 1e-12, (name, found[name])
        keys = {(2, HEADS, LENGTH, NOPE + ROPE), (2, HEADS, LENGTH, VALUE), (2, LENGTH, HEADS * (NOPE + VALUE))}
        latent = (2, LENGTH, RANK + ROPE)
        if inner == "aot_eager":  # a compiler computes keys of all tokens again; autograd alone keeps them
            assert not keys & set(shapes), shapes
            assert shapes.count(latent) == 2, shapes
        else:
            assert keys & set(shapes)
