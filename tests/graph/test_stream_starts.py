"""Where the stream of tokens starts: what is computed before the first product does not hide which dim holds them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import verify
from tests.graph.small_models import VOCABULARY, TinyLM

WIDTH = 8
Program = Callable[["Model", Tensor], Tensor]


class Model(TinyLM):
    """Runs a program on its one input."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.near, self.far = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 1)
        self.norm, self.running = nn.GroupNorm(2, WIDTH), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.program(self, x).pow(2).mean()

    def block(self, x: Tensor) -> Tensor:
        return self.head(x + self.attend(x))


def behind_convolutions(m: Model, x: Tensor) -> Tensor:
    y = m.far(F.gelu(m.running(m.norm(m.near(x.mT)))))
    return m.block(y.mT)


def behind_a_split(m: Model, x: Tensor) -> Tensor:
    first, second = x.split((3, WIDTH - 3), dim=-1)
    return m.block(torch.cat([second, first], dim=-1))


def behind_groups(m: Model, x: Tensor) -> Tensor:
    y = x[..., :1].squeeze(-1).unflatten(1, (-1, 2)) * torch.arange(2)
    return m.block(F.pad(y, (0, WIDTH - 2)))


def behind_a_range(m: Model, x: Tensor) -> Tensor:
    return m.block(x[:, :-1]) - F.pad(x, (0, VOCABULARY - WIDTH))[:, 1:]


def behind_delays(m: Model, x: Tensor) -> Tensor:
    delayed = torch.stack([F.pad(x, (0, 0, k, 0))[:, : x.shape[1]] for k in range(2)])
    return m.block(delayed[0] + delayed[1].sin())


PROGRAMS = (behind_convolutions, behind_a_split, behind_groups, behind_a_range, behind_delays)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_exact(program: Program) -> None:
    x = torch.randn(2, 14, WIDTH, dtype=torch.float64)
    for world_size in (2, 3):
        options = {"token_dims": {"x": 1}, "dynamic": False}
        verify(Model(program), {"x": x}, world_size=world_size, dtype=torch.float64, **options).raise_if_wrong()


class Image(nn.Module):
    """Products of the rows and columns of an image, in both layouts; it has no attention."""

    def __init__(self, is_convolution: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cut, self.mix = nn.Conv2d(3, WIDTH, 4, 4), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.product = nn.Conv2d(WIDTH, WIDTH, 1) if is_convolution else nn.Linear(WIDTH, WIDTH)
        self.is_convolution = is_convolution

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.cut(pixels)
        y = self.product(x) if self.is_convolution else self.product(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.mix(F.gelu(y)).pow(2).mean()


@pytest.mark.parametrize("is_convolution", [False, True])
def test_rows_of_an_image(is_convolution: bool) -> None:
    pixels = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    found = verify(Image(is_convolution), {"pixels": pixels}, world_size=3, dtype=torch.float64)
    found.raise_if_wrong()
    assert found.transformed.plan.num_tokens == 5


class Channels(TinyLM):
    """Attention from channels to channels: their features are the tokens."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q = x.mT.unflatten(1, (2, -1))
        y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), q, q.sin(), scale=0.7)
        return self.head(x + y.flatten(1, 2).mT)


def test_attention_from_channels_to_channels() -> None:
    ids = torch.randint(VOCABULARY, (2, 13))
    for world_size in (1, 2, 3, 4):
        inputs = {"input_ids": ids, "labels": ids}
        verify(Channels(), inputs, world_size=world_size, dtype=torch.float64, dynamic=False).raise_if_wrong()
