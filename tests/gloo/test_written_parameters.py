"""Parameters that the forward writes, on gloo ranks: loss, gradients and what is written are those of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import cpcompile
from tests.graph.small_models import TinyLM, batch
from tests.models import error, errors, gradients


class Clipped(TinyLM):
    """Shrinks its head where the optimizer does not look, and cuts off what is large."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        self.head.weight.data.mul_(0.5)
        self.head.weight.data.clamp_(-0.05, 0.05)
        return self.head(x + self.attend(x))


def train(rank: Any, inner: str) -> dict[str, float]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    alone, inputs, found = Clipped().double(), batch(7), {}
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), inner=inner)
    for step in range(2):
        losses, grads = [], []
        for each in (model, alone):
            each.zero_grad()
            loss = each(**inputs)
            loss.backward()
            losses.append(loss.detach())
            grads.append(gradients(each))
            torch.optim.SGD(each.parameters(), 0.5).step()
        found |= {f"loss {step}": error(*losses)}
        found |= {f"{name} {step}": x for name, x in errors(*grads).items()}
        found |= {f"head {step}": error(model.head.weight.detach(), alone.head.weight.detach())}
    return found


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_trains_exactly(pool: Any, inner: str) -> None:
    for found in pool.run(2, train, inner, timeout=250):
        worst = max(found, key=found.__getitem__)
        assert found[worst] < 1e-10, f"{worst} is off by {found[worst]:.1e}"
