"""What random programs found, each by its smallest program."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import NoRule, verify

VOCABULARY, WIDTH = 13, 8


class Small(nn.Module):
    """An embedding and a product; subclasses say what happens between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def between(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.linear(self.between(self.embed(input_ids)))


def ids(batch: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(VOCABULARY, (batch, length), generator=generator)}


def exact(model: nn.Module, inputs: dict[str, Tensor], world_size: int, **options: Any) -> None:
    verify(model, inputs, world_size=world_size, dtype=torch.float64, **options).raise_if_wrong()


def test_range_of_one_token_while_rows_are_symbolic() -> None:
    """2 rows of 2 tokens: both sizes may change, and the range of 1 token does not."""

    class Later(Small):
        def between(self, x: Tensor) -> Tensor:
            batch, length, width = x.shape
            later = x[:, 1:].reshape(-1, width).tanh()
            return F.pad(later.reshape(batch, length - 1, width), (0, 0, 1, 0))

    with contextlib.suppress(NoRule):  # 2 rows of 1 token could as well be 1 row of 2
        exact(Later(), ids(2, 2), 8, strict=False)


def test_write_through_one_token() -> None:
    """One token of a sharded value is a copy on every rank: what is written into it must reach the value."""

    class Written(Small):
        def between(self, x: Tensor) -> Tensor:
            x = x.clone()
            x[:, 0] = 0
            x[:, -1].add_(1)
            x[:, 1:3] *= 2
            return x

    for balancer in ("contiguous", "zig_zag"):
        exact(Written(), ids(2, 7), 3, balancer=balancer, strict=False)


def test_squeeze_where_each_rank_holds_one_token() -> None:
    """A dim of 8 tokens is no dim of 1 for the rank that holds one of them."""

    class Squeezed(Small):
        def between(self, x: Tensor) -> Tensor:
            return x.squeeze(1) + x.squeeze() + x.unsqueeze(0).squeeze((0, 2))

    for dynamic in (True, False):
        torch._dynamo.reset()
        exact(Squeezed(), ids(2, 8), 8, dynamic=dynamic, balancer="contiguous")
