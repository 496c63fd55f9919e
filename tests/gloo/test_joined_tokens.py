"""Joined and grouped tokens on gloo ranks against one device: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile
from tests.graph.test_joined_tokens import PROGRAMS, SoftPrompt
from tests.models import error, errors, gradients

EXACT = 1e-12  # float64


def run(rank: Any, name: str) -> dict[str, float]:
    torch._dynamo.reset()
    make, inputs, options = PROGRAMS[name]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make().double())
    model, alone = models
    given = inputs()
    cpcompile.apply(model, rank.mesh(), inner="eager", balancer="zig_zag", **options)
    losses = [m(**given) for m in (model, alone)]
    for loss in losses:
        loss.backward()
    return {"loss": error(losses[0].detach(), losses[1].detach())} | errors(gradients(model), gradients(alone))


class Prompted(SoftPrompt):
    """Returns hidden states of the prompt and the tokens, and of the tokens alone."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        x = self.embed(input_ids)
        joined = self.blocks[0](torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1))
        return joined, self.blocks[1](x)


def outputs(rank: Any) -> tuple[float, float, str]:
    torch._dynamo.reset()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Prompted().double())
    model, alone = models
    cpcompile.apply(model, rank.mesh(), inner="eager", balancer="zig_zag")
    input_ids = torch.randint(17, (2, 12), generator=torch.Generator().manual_seed(1))
    found = [cpcompile.unshard(x, model) for x in model(input_ids=input_ids)]
    ambiguous = ""
    joined, own = model(input_ids=input_ids[:, :9])
    try:
        cpcompile.unshard(joined, model)
    except cpcompile.ConfigError as refusal:
        ambiguous = str(refusal)
    assert cpcompile.unshard(own, model, length=9).shape[1] == 9
    errors_of = [error(x.detach(), y.detach()) for x, y in zip(found, alone(input_ids=input_ids), strict=True)]
    return *errors_of, ambiguous


def test_outputs_of_joined_tokens_come_back_whole(pool: Any) -> None:
    """12 and 15 tokens are 6 and 8 slots of each of 2 ranks; 9 and 12 are 6 either."""
    for of_joined, of_own, ambiguous in pool.run(2, outputs):
        assert max(of_joined, of_own) < EXACT
        assert "a rank's part of 9 and of 12 tokens" in ambiguous


@pytest.mark.filterwarnings("ignore:one graph for all lengths cannot be sharded")
@pytest.mark.parametrize(
    ("name", "world_size"),
    [("masked", 3), ("soft prompt", 2), ("class token", 3), ("merged", 2), ("patches", 2)],
)
def test_equals_one_device(pool: Any, name: str, world_size: int) -> None:
    for found in pool.run(world_size, run, name):
        assert max(found.values()) < EXACT, found
