"""MLPs by tiles of tokens on gloo ranks, beside losses in chunks, activation checkpoints and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import cpcompile
from cpcompile.runtime.tiles.by_rows import _FUNCTIONS
from tests.models import batch, error, errors, loss_of, make

FLOAT32 = 2e-5  # transformers models cast to float32 themselves: rounding, times the depth


def trained(rank: Any, inner: str, is_sharded: bool) -> dict[str, float]:
    """Errors of two backward passes, of sequences of two lengths that two ranks do not divide."""
    torch._dynamo.reset()
    _FUNCTIONS.clear()
    model, alone = make("llama"), make("llama")
    model.gradient_checkpointing_enable()
    model.train()
    if is_sharded:
        for layer in model.model.layers:
            fully_shard(layer, mesh=rank.mesh())
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), inner=inner, tile=4, loss_chunk=5)
    found: dict[str, float] = {}
    for length in (29, 35):
        losses = [loss_of(m(**batch(alone, length))) for m in (model, alone)]
        for loss in losses:
            loss.backward()
        found[f"loss {length}"] = error(losses[0].detach(), losses[1].detach())
    (function,) = _FUNCTIONS.values()  # the layers are equal
    assert bool(function._compiled) == (inner == "inductor")
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}
    return found | errors(whole, {name: p.grad for name, p in alone.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    ("inner", "is_sharded"), [("aot_eager", False), pytest.param("inductor", True, marks=pytest.mark.slow)]
)
def test_trains_exactly(pool: Any, inner: str, is_sharded: bool) -> None:
    for found in pool.run(2, trained, inner, is_sharded, timeout=250):
        assert max(found.values()) < FLOAT32, found
