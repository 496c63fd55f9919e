"""Lockstep: what ranks draw alike is drawn alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cpcompile import verify
from tests.graph.small_models import TinyLM, batch

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "drop path": lambda x: x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5) / 0.5,
    "rand": lambda x: x * (torch.rand(x.shape[0], 1, 1) < 0.5),
    "noise of a row": lambda x: x + torch.randn(x.shape[0], 1, 8, dtype=x.dtype),
    "noise like the first token": lambda x: x + torch.randn_like(x[:, :1]),
    "uniform": lambda x: x + x.new_empty(x.shape[0], 1, 8).uniform_(),
    "exponential": lambda x: x + x.new_zeros(x.shape[0], 1, 8).exponential_(),
    "by a probability that all ranks hold": lambda x: x * torch.bernoulli(x.mean((1, 2), keepdim=True).sigmoid()),
    "shuffled rows": lambda x: x[torch.randperm(x.shape[0])],
    "several": lambda x: (
        x * x.new_empty(2, 1, 1).bernoulli_(0.5) + torch.rand(2, 1, 1) + x.new_empty(2, 1, 1).normal_()
    ),
}


class Drawing(TinyLM):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.draw(self.embedding(input_ids))
        return self.head(x + self.attend(x))


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS.keys())
def test_random_numbers_of_whole_values_are_those_of_one_device(draw: Callable[[Tensor], Tensor]) -> None:
    verify(Drawing(draw), batch(16), world_size=3, dtype=torch.float64).raise_if_wrong()
