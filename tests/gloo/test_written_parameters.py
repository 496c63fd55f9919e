"""Parameters that the forward writes, on gloo ranks: loss, gradients and what is written are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cpcompile
from tests.models import RotaryLM, batch, error, errors, gradients


class Clipped(RotaryLM):
    """Shrinks what the optimizer has made, and cuts off what is large, in every block."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        for block in self.blocks:
            block.qkv.weight.data.mul_(0.9).clamp_(-0.1, 0.1)
            x = block(x)
        with torch.no_grad():
            self.head.weight[0] *= 0.5
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def train(rank: Any, inner: str) -> dict[str, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    alone, found = Clipped(heads=2, width=16).double(), {}
    inputs = batch(alone, 7)
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner, memory_budget=0)
    for step in range(2):
        losses = [each(**inputs)["loss"] for each in (model, alone)]
        for each, loss in zip((model, alone), losses, strict=True):
            each.zero_grad()
            loss.backward()
        found |= {f"loss {step}": error(*losses)}
        found |= {f"{name} {step}": x for name, x in errors(*map(gradients, (model, alone))).items()}
        for each in (model, alone):
            torch.optim.SGD(each.parameters(), 0.5).step()
        both = zip(model.named_parameters(), alone.parameters(), strict=True)
        found |= {f"parameter {name} {step}": error(x.detach(), y.detach()) for (name, x), y in both}
    return found


@pytest.mark.parametrize(
    "inner", ["eager", *(pytest.param(x, marks=pytest.mark.slow) for x in ("aot_eager", "inductor"))]
)
def test_trains_exactly(pool: Any, inner: str) -> None:
    for found in pool.run(2, train, inner, timeout=250):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < 1e-10, f"{worst} is off by {found[worst]:.1e}"
