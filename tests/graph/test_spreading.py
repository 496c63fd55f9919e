"""What leaves more tokens than it reads: transposed convolutions and folded patches that overlap, and resizing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH = 8
TEXT = {"input_ids": torch.arange(13)[None] % 7}  # one row, so that ranks have nothing but tokens and channels to share


class Model(nn.Module):
    """Makes more of the channels `[B, C, S]` of a text."""

    def __init__(self, spread: Callable[[Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.spread, self.embed, self.head = spread, nn.Embedding(7, width), nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        y = self.spread(self.embed(input_ids).mT).flatten(2).mT
        return self.head(y).square().mean() + y.sin().sum()


def check(model: nn.Module, inputs: dict[str, Tensor], travels: set[str], **options: Any) -> None:
    """Check a model on 2, 3 and 4 ranks, and by which operators its tokens travel."""
    found = cpcompile.explain(model, inputs, world_size=2, dynamic=False, **options)
    assert {c.operator for c in found.collectives} - {"cp.all_reduce"} == travels
    for world_size, layout in ((2, "zig_zag"), (3, "contiguous"), (4, "zig_zag")):
        settings = {"world_size": world_size, "balancer": layout, "dtype": torch.float64, "dynamic": False}
        cpcompile.verify(model, inputs, **settings, **options).raise_if_wrong()


def transposed(kernel: int, stride: int, padding: int, **options: int) -> nn.Module:
    return nn.ConvTranspose1d(WIDTH, WIDTH, kernel, stride, padding, **options)


CONVOLUTIONS = {
    "kernel of two strides": transposed(4, 2, 1),
    "kernel of one and a half": transposed(3, 2, 1, output_padding=1, groups=4),
    "kernel of three": transposed(9, 3, 3),
    "dilated": transposed(3, 2, 2, output_padding=1, dilation=2),
    "no stride": transposed(3, 1, 1),
    "fewer results": transposed(4, 2, 2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_transposed_convolutions(name: str) -> None:
    torch.manual_seed(0)
    check(Model(CONVOLUTIONS[name]).double(), TEXT, {"cp.halo_tokens"})


class Causal(nn.Module):
    """Leaves out what reaches behind the last token, as decoders of sound do."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = transposed(6, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(x)[..., : 2 * x.shape[-1]]


def test_what_is_spread_behind_the_last_token_may_be_cut_off() -> None:
    torch.manual_seed(0)
    check(Model(Causal()).double(), TEXT, {"cp.halo_tokens"})


def test_what_is_spread_behind_the_last_token_is_not_known() -> None:
    with pytest.raises(cpcompile.NoRule, match="tokens outside the sequence would be read"):
        cpcompile.explain(Model(transposed(4, 2, 0)), TEXT, world_size=2, dynamic=False)


def overlap_and_add(x: Tensor) -> Tensor:
    """Add up frames of 4 that overlap by 2, as an inverse of short Fourier transforms does."""
    return F.fold(x, (1, 2 * x.shape[-1]), (1, 4), padding=(0, 1), stride=(1, 2))


def test_frames_that_overlap() -> None:
    torch.manual_seed(0)
    check(Model(overlap_and_add, 4 * WIDTH).double(), TEXT, {"cp.halo_tokens"})


class Outlook(nn.Module):
    """Patches of an image that overlap, weighted and folded, as VOLO has them."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride, self.embed, self.head = stride, nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, WIDTH, 1)
        self.weigh = nn.Conv2d(WIDTH, 9 * WIDTH, stride, stride)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).sin()
        patches = self.weigh(x).flatten(2)
        y = F.fold(patches * patches.sigmoid(), x.shape[-2:], 3, padding=1, stride=self.stride)
        return self.head(y + x).square().mean() + y.sin().sum()


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_of_an_image(stride: int) -> None:
    torch.manual_seed(0)
    model, image = Outlook(stride).double(), torch.rand(1, 3, 28, 12, dtype=torch.float64)
    check(
        model,
        {"image": image},
        {"cp.halo_tokens"} | ({"cp.rearrange_tokens"} if stride > 1 else set()),
        token_dims={"image": 2},
    )


RESIZED: dict[str, dict[str, Any]] = {
    "each token twice": {"scale_factor": 2},
    "between tokens": {"size": 9, "mode": "linear"},
    "every other token": {"scale_factor": 0.5, "mode": "nearest-exact"},
}


@pytest.mark.parametrize("name", RESIZED)
def test_resizing_runs_by_channels(name: str) -> None:
    torch.manual_seed(0)
    check(Model(lambda x: F.interpolate(x, **RESIZED[name])).double(), TEXT, {"cp.exchange_dims"})


def test_resizing_without_channels_is_refused() -> None:
    model = Model(lambda x: F.interpolate(x[:, :1], scale_factor=2).expand(-1, WIDTH, -1))
    with pytest.raises(cpcompile.NoRule, match="there are no channels that ranks could share; resize before the model"):
        cpcompile.explain(model, TEXT, world_size=2, dynamic=False)
