"""Operators along the tokens: shifts, joins, ends and look-ups are exact in every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile

WIDTH = 8


def token_shift(x: Tensor) -> Tensor:
    """RWKV's: each token sees the one before."""
    return x + 0.5 * F.pad(x, (0, 0, 1, -1))


def shift_by_join(x: Tensor) -> Tensor:
    return x * torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def shift_and_keep_first(x: Tensor) -> Tensor:
    return x + torch.cat([x[:, :1], x[:, 1:] - x[:, :-1]], 1)


def shift_to_the_left(x: Tensor) -> Tensor:
    return x * F.pad(x, (0, 0, 0, 1))[:, 1:].tanh()


def join_and_cut(x: Tensor) -> Tensor:
    return x + torch.cat([x.new_ones(x.shape[0], 2, x.shape[2]), x], 1)[:, : x.shape[1]]


def join_nothing(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(x.shape[0], 0, x.shape[2]), x.tanh()], 1)


def two_windows(x: Tensor) -> Tensor:
    """A centred difference, padded back to the length."""
    return F.pad(x[:, 2:] - x[:, :-2], (0, 0, 1, 1))


def roll(x: Tensor) -> Tensor:
    return x + torch.roll(x, (5, 1), (1, 2)).tanh()


def turned_round(x: Tensor) -> Tensor:
    return x * x.flip(1) + x.flip(1, 2)


def joined_with_itself(x: Tensor) -> Tensor:
    return torch.cat([x, x.tanh()], 1).view(x.shape[0], 2, x.shape[1], -1).sum(1)


def repeated(x: Tensor) -> Tensor:
    return (x.flatten(0, 1).repeat(3, 1) * 0.5).view(3, -1, x.shape[-1]).sum(0)


def differences(x: Tensor) -> Tensor:
    return x[:, 1:] * x.diff(dim=1)


def last_token(x: Tensor) -> Tensor:
    return x[:, -1] * x[:, 0]


def last_tokens(x: Tensor) -> Tensor:
    return x[:, -3:].tanh()


def one_token_of_each_row(x: Tensor) -> Tensor:
    last = torch.arange(x.shape[0], device=x.device) + 3
    return x[torch.arange(x.shape[0]), last] + x[torch.arange(x.shape[0]), -1]


def gathered(x: Tensor) -> Tensor:
    index = torch.tensor([1, 4], device=x.device)[None, :, None].expand(x.shape[0], 2, x.shape[2])
    return x.gather(1, index) + x.index_select(1, torch.tensor([6, 0], device=x.device))


def looked_up(x: Tensor) -> Tensor:
    """Each token reads others, whose places follow from values; every rank has all that they may read."""
    places = (torch.arange(x.shape[1], device=x.device) + 3 * (x[..., 0] > 0)) % x.shape[1]
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    read = x.gather(1, places[..., None].expand_as(x)) * x.index_select(1, places[0])
    return read + x.tanh()[rows, places] * x


def first_apart(x: Tensor) -> Tensor:
    """A token of the class is handled apart from the others, and put back."""
    first, others = x.split((1, x.shape[1] - 1), dim=1)
    return x * torch.cat([first.tanh(), others * others.narrow(1, 0, x.shape[1] - 1).sigmoid()], 1)


def is_last_positive(x: Tensor) -> Tensor:
    return torch.where((x > 0)[:, -1], x[:, 2], 1.0)


def truths_looked_up(x: Tensor) -> Tensor:
    """Truth values are added as numbers, where a rank has the token that is asked for."""
    few = torch.tensor([6, 0, 6], device=x.device)
    flags = x > 0
    chosen = flags[:, few] | flags.index_select(1, few) & flags.gather(
        1, few[None, :, None].expand(x.shape[0], 3, x.shape[2])
    )
    return x * (1.0 + chosen.to(x.dtype).sum(1, keepdim=True))


def looked_up_more_often_than_there_are_tokens(x: Tensor) -> Tensor:
    """A table of blocks that each token of a mask reads: the table is gathered."""
    places = torch.arange(200, device=x.device) % 7
    read = (x > 0)[:, places].to(x.dtype) + x.index_select(1, places).tanh()
    return x * (read * torch.arange(200, dtype=x.dtype, device=x.device)[:, None]).mean(1, keepdim=True)


def twice_shifted(x: Tensor) -> Tensor:
    """The second pad puts new tokens in slots that the first cut freed."""
    return x * F.pad(F.pad(x[:, 2:], (0, 0, 1, 0), value=3.0), (0, 0, 1, 0), value=5.0)


CONVOLUTION = torch.randn(WIDTH, WIDTH // 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convolved(x: Tensor) -> Tensor:
    """Mamba's: each channel by itself, padded on both sides, cut back to the length."""
    return x * F.conv1d(x.mT, CONVOLUTION[:, :1], padding=3, groups=WIDTH)[..., : x.shape[1]].mT.tanh()


def convolved_after_padding(x: Tensor) -> Tensor:
    return x + F.conv1d(F.pad(x.mT, (6, 0)), CONVOLUTION, dilation=2, groups=2).mT.tanh()


def convolved_centred(x: Tensor) -> Tensor:
    y = F.conv1d(x.mT, CONVOLUTION, padding="same", dilation=2, groups=2).tanh()
    return F.conv1d(F.pad(y, (1, 2)), CONVOLUTION, groups=2).mT


def convolved_a_part(x: Tensor) -> Tensor:
    """The second convolution reads a range of the tokens; the loss reads less."""
    y = F.conv1d(x[:, 1:-2].mT, CONVOLUTION, groups=2).tanh()
    return F.conv1d(y, CONVOLUTION[..., :3], padding=1, groups=2).mT


def convolved_to_the_left(x: Tensor) -> Tensor:
    return F.conv1d(x.mT, CONVOLUTION, padding=3, groups=2)[..., 3:].mT * x


def convolved_in_two_dims(x: Tensor) -> Tensor:
    weight = CONVOLUTION[:, None, :3, :2]
    return F.conv2d(x[:, None], weight, padding=(1, 0)).tanh().sum((1, 3))[..., None] * x


def sums_so_far(x: Tensor) -> Tensor:
    return x.cumsum(1).tanh() + torch.logcumsumexp(x, 1) * (x > 0).cumsum(1)


def products_so_far(x: Tensor) -> Tensor:
    return (x[:, 1:] + 1.5).cumprod(1).tanh()


def extremes_so_far(x: Tensor) -> Tensor:
    values, indices = x[:, 2:-1].cummax(1)
    return values * indices + x.cummin(1).values[:, 2:-1]


def sums_before(x: Tensor) -> Tensor:
    """The sum of all tokens before each one."""
    return F.pad(x, (0, 0, 1, 0)).cumsum(1)[:, :-1] * x


def extremes(x: Tensor) -> Tensor:
    return x * x.amax(1, keepdim=True) + x.min(dim=1, keepdim=True).values + x.max() + x.amin((0, 1))


def indices_of_extremes(x: Tensor) -> Tensor:
    values, indices = x[:, 1:-2].max(1)
    return values * indices + x[..., 0].argmin() + x.argmax()


def extremes_of_all_rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1).amax(0).tanh() + x.view(-1).argmax()


def truths(x: Tensor) -> Tensor:
    seen = (x > 0)[:, 1:]
    return (
        x * seen.any(1, keepdim=True)
        + x * (x > -5).all()
        + seen.sum()
        + seen.all((0, 1))
        + seen.count_nonzero(1)[:, None]
    )


def spreads(x: Tensor) -> Tensor:
    spread, mean = torch.var_mean(x, 1, keepdim=True)
    return (x - mean) / spread + x[:, 1:].std() + x.var((0, 1), correction=0)


def norms(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True) + x.norm(1) + x[:, 2:].norm(float("inf"), dim=(0, 1))


def weights_over_tokens(x: Tensor) -> Tensor:
    """Attention pooling."""
    weights = x[..., :1].softmax(1)
    return (weights * x).sum(1).tanh() * x.logsumexp(1) + x[:, 1:].log_softmax(1).mean(1) + (x[:, :-1] / 9).prod(1)


def losses(x: Tensor) -> Tensor:
    """Predictions of the next token's states; some of one row."""
    x, y = x[:, :-1], x[:, 1:].detach()
    total = (
        F.mse_loss(x, y) + F.smooth_l1_loss(x, y, reduction="sum") + F.binary_cross_entropy_with_logits(x, y.sigmoid())
    )
    return (total + F.kl_div(x.log_softmax(-1), y.softmax(-1), reduction="batchmean")).expand(2, WIDTH)


FUNCTIONS = [
    losses,
    sums_so_far,
    products_so_far,
    extremes_so_far,
    sums_before,
    extremes,
    indices_of_extremes,
    extremes_of_all_rows,
    truths,
    spreads,
    norms,
    weights_over_tokens,
    convolved,
    convolved_after_padding,
    convolved_centred,
    convolved_a_part,
    convolved_to_the_left,
    convolved_in_two_dims,
    token_shift,
    shift_by_join,
    shift_and_keep_first,
    shift_to_the_left,
    join_and_cut,
    join_nothing,
    two_windows,
    roll,
    turned_round,
    joined_with_itself,
    repeated,
    differences,
    last_token,
    last_tokens,
    one_token_of_each_row,
    gathered,
    looked_up,
    first_apart,
    is_last_positive,
    truths_looked_up,
    looked_up_more_often_than_there_are_tokens,
    twice_shifted,
]


class Along(nn.Module):
    """Applies a function to hidden states, and projects what comes out to a number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.function = function

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.mix(self.embedding(input_ids)).tanh()
        return self.out(self.function(x)).pow(2).sum()


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("world_size", "layout", "length"), [(1, "zig_zag", 9), (2, "zig_zag", 9), (3, "contiguous", 20)]
)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_exact(function: Callable[[Tensor], Tensor], world_size: int, layout: str, length: int, dynamic: bool) -> None:
    model = Along(function).double()
    ids = torch.randint(16, (2, length), generator=torch.Generator().manual_seed(length))
    found = cpcompile.verify(
        model, {"input_ids": ids}, world_size=world_size, dtype=torch.float64, balancer=layout, dynamic=dynamic
    )
    found.raise_if_wrong()


def test_truth_values_that_are_looked_up() -> None:
    """Each rank once took its own part of them for the whole."""
    for function in (truths_looked_up, looked_up_more_often_than_there_are_tokens):
        test_exact(function, 3, "contiguous", 20, dynamic=True)
