"""Attention on a range of the tokens on gloo ranks against one device, by every strategy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cpcompile
from tests.models import NanoGPT, batch, error, errors, gradients

EXACT = 1e-12  # float64


class Range(NanoGPT):
    """Attends, after its blocks, from all tokens but the first to these, causally, to all of them, and to documents."""

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = self.wte(idx)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (x[:, 1:], x[:, 1:].sin(), x[:, :-1]))
        number = (idx[:, 1:] < 20).cumsum(1)
        mask = number[:, None, :, None] == number[:, None, None]
        sdpa = F.scaled_dot_product_attention
        y = sdpa(q, k, v, is_causal=True) + sdpa(q, k, v) + sdpa(q, k, v, mask)
        return (self.lm_head(y.transpose(1, 2).flatten(2)) * x[:, 1:, :1]).pow(2).mean()


def run(rank: Any, strategy: str) -> dict[str, float]:
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Range(num_layers=1).double())
    model, alone = models
    cpcompile.apply(model, rank.mesh(), inner="eager", strategy=strategy, balancer="zig_zag")
    found = {}
    for length in (31, 32):
        inputs = batch(alone, length)
        losses = [m(**inputs) for m in (model, alone)]
        for loss in losses:
            loss.backward()
        found[f"loss {length}"] = error(losses[0].detach(), losses[1].detach())
        found |= {f"{n} {length}": x for n, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize(("strategy", "world_size"), [("ring", 3), ("ulysses", 2), ("gather", 3)])
def test_attention_on_a_range(pool: Any, strategy: str, world_size: int) -> None:
    for found in pool.run(world_size, run, strategy):
        assert max(found.values()) < EXACT, found
