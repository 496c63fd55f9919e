"""Models that make their tokens themselves, as patches of an image: the attentions say how many there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.inspect.explain import explain

WIDTH, HEADS = 16, 2


class Patches(nn.Module):
    """Cuts an image into patches, puts a token of the class before them and classifies by it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.first = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 26, WIDTH))
        self.qkv, self.norm, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.cut(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.positions
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x[:, 0]), labels) + x.pow(2).mean()


def images() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 20, 20, dtype=torch.float64, generator=generator)
    return {"pixels": pixels, "labels": torch.tensor([3, 1])}


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather"])
@pytest.mark.parametrize(
    ("world_size", "layout"), [(1, "contiguous"), (2, "zig_zag"), (3, "contiguous"), (4, "zig_zag")]
)
def test_exact(world_size: int, layout: str, strategy: str) -> None:
    found = cpcompile.verify(
        Patches().double(), images(), world_size=world_size, dtype=torch.float64, balancer=layout, strategy=strategy
    )
    found.raise_if_wrong()


def test_patches_are_sharded_before_the_first_product() -> None:
    plan = explain(Patches().double(), images(), world_size=2)
    assert (plan.tokens, plan.local_tokens, plan.token_inputs) == (26, 13, {})
    assert "tokens of the attentions" in str(plan)
    assert not plan.gathered


class TalkingHeads(Patches):
    """Its scores are mixed between heads, which is a form of attention that no pattern knows."""

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.cut(pixels).flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        scores = (q @ k.mT / 3).permute(0, 2, 3, 1) @ self.positions[0, :HEADS, :HEADS]
        x = x + (scores.permute(0, 3, 1, 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return F.cross_entropy(self.head(x.mean(1)), labels)


def test_rows_of_products_say_how_many_where_no_attention_is_known() -> None:
    options = {"world_size": 2, "balancer": "contiguous"}
    found = cpcompile.verify(TalkingHeads().double(), images(), dtype=torch.float64, **options)
    found.raise_if_wrong()
    assert found.transformed.plan.num_tokens == 25


def test_attention_that_never_meets_the_tokens_is_said_to_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    class Beside(Patches):
        def forward(self, pixels: Tensor, labels: Tensor, x: Tensor) -> Tensor:
            return super().forward(pixels, labels) + self.head(x).pow(2).mean()

    inputs = {**images(), "x": torch.randn(2, 6, WIDTH, dtype=torch.float64)}
    explain(Beside().double(), inputs, world_size=2, token_dims={"x": 1})
    assert "1 attention(s) run whole on every rank" in caplog.text
    assert "F.scaled_dot_product_attention(q, k, v)" in caplog.text
