"""Keys and values of a latent that was gathered, on gloo ranks: loss, every gradient, and what is kept for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_gather_latents import NOPE, RANK, ROPE, Deep, Eight
from tests.models import error, errors, gradients

LENGTH = 13


def inputs() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 13, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.roll(1, 1)}


def train(rank: Any, strategy: str, inner: str, layout: str) -> tuple[dict[str, float], list[tuple[int, ...]]]:
    """Return the errors of loss and gradients, and the shapes that are kept for backward."""
    torch._dynamo.reset()
    alone = (Deep if rank.world_size == 3 else Eight)().double()
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, strategy=strategy, balancer=layout)
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


@pytest.mark.parametrize(
    ("strategy", "world_size", "inner", "layout"),
    [
        ("latent", 2, "eager", "contiguous"),
        pytest.param("latent", 3, "aot_eager", "zig_zag", marks=pytest.mark.slow),
        ("latent_heads", 2, "aot_eager", "zig_zag"),
    ],
)
def test_loss_and_gradients_are_exact(pool: Any, strategy: str, world_size: int, inner: str, layout: str) -> None:
    for found, shapes in pool.run(world_size, train, strategy, inner, layout):
        name = max(found, key=found.__getitem__)
        assert found[name] < 1e-12, (name, found[name])
        all_heads = (Deep if world_size == 3 else Eight).num_heads
        heads = all_heads // world_size if strategy == "latent_heads" else all_heads
        # Queries of one head for all tokens, which are kept, have the shape of its keys.
        num_kept = shapes.count((2, heads, LENGTH, NOPE + ROPE)) - (2 if heads == 1 else 0)
        # A compiler computes the keys of both layers again from what was gathered; autograd alone keeps them.
        assert num_kept == (2 if inner == "eager" else 0), shapes
        if inner != "eager":
            assert shapes.count((2, LENGTH, RANK + ROPE)) == 2, shapes


TERMS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 5},
    "documents": {"is_causal": True, "documents": torch.arange(LENGTH).expand(2, -1) // 4},
    "padding": {"key_padding": torch.arange(LENGTH) < torch.tensor([[LENGTH], [9]])},
    "sinks": {"is_causal": True, "sinks": torch.linspace(-1, 1, 8, dtype=torch.float64)},
    "slopes": {"is_causal": True, "slopes": torch.linspace(0.1, 1, 8, dtype=torch.float64)},
    "dropout": {"is_causal": True, "dropout": 0.3, "seed": torch.tensor(7), "site": 3},
}


def attend(rank: Any, strategy: str, layout: str, options: dict[str, Any]) -> dict[str, float]:
    """Return the largest error of output and gradients for each kind of terms, 8 query heads and 4 key heads."""
    cp, found = torch.ops.cpcompile, {}
    axis = {"length": LENGTH, "layout": layout, "world_size": rank.world_size, "group": rank.group}
    for name, terms in TERMS.items():
        generator = torch.Generator().manual_seed(0)
        shapes = (8, 6), (4, 6), (4, 5), (8, 5)
        q, k, v, dout = (
            torch.randn(2, heads, LENGTH, dim, generator=generator, dtype=torch.float64) for heads, dim in shapes
        )
        given: dict[str, Any] = dict.fromkeys(("mask", "documents", "key_padding"))
        given |= {"scale": 0.4, "is_causal": False, "window": 0, "softcap": 0.0} | terms
        leaves = [x.requires_grad_() for x in (q, k, v)]
        expected = cp.attention(q, k, v, **given)
        gradients = torch.autograd.grad(expected, leaves, dout)
        keys = [k, v]
        if strategy == "latent_heads":
            keys = [cp.shard_tokens(x, 1, 1, 4, "contiguous", rank.world_size, rank.group) for x in keys]
        local = cp.shard_tokens(q, 2, 1, *axis.values())
        out = getattr(cp, f"{strategy}_attention")(local, *keys, **given, **axis, **options)[0]
        whole = cp.gather_tokens(out, 2, 1, *axis.values())
        # The whole output is on every rank, and its gradient is given once.
        grads = torch.autograd.grad(whole, leaves, dout / rank.world_size)
        total = [cp.all_reduce(x, rank.world_size, rank.group) for x in grads]
        pairs = zip((whole, *total), (expected, *gradients), strict=True)
        found[name] = max(error(a.detach(), b.detach()) for a, b in pairs)
    return found


@pytest.mark.parametrize(
    ("strategy", "world_size", "layout", "options"),
    [
        ("latent", 3, "zig_zag", {}),
        ("latent", 4, "contiguous", {}),
        ("latent_heads", 2, "zig_zag", {}),
        ("latent_heads", 4, "contiguous", {}),
        ("latent_heads", 2, "contiguous", {"keeps_heads": False}),
        ("latent_heads", 2, "zig_zag", {"heads_per_message": 1}),
    ],
)
def test_operators_are_attention(
    pool: Any, strategy: str, world_size: int, layout: str, options: dict[str, Any]
) -> None:
    for found in pool.run(world_size, attend, strategy, layout, options):
        assert found.keys() == TERMS.keys()
        assert max(found.values()) < 1e-12, found
