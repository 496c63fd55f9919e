"""Ranges of tokens: slices along the sequence keep their slots, so that losses that shift by slicing are exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cpcompile
from cpcompile.ir.placement import Sharded
from tests.models import VOCABULARY, RotaryLM, batch

Loss = Callable[[Tensor, Tensor], Tensor]


def shifted_by_slicing(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that most models written by hand use."""
    return F.cross_entropy(logits[..., :-1, :].contiguous().view(-1, VOCABULARY), labels[..., 1:].contiguous().view(-1))


def difference(logits: Tensor, labels: Tensor) -> Tensor:
    """Ranges of as many tokens in other slots are brought in line."""
    return (logits[:, 1:] - logits[:, :-1]).pow(2).mean()


def without_the_first(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[:, 1:].pow(2).mean() + 0.01 * logits[:, :-2].sum()


def twice_sliced(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits[:, 3:][:, :-1] * labels[:, :-4, None]).pow(2).mean()


class Model(RotaryLM):
    """A decoder with a loss of one's own."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        return self.loss(super().forward(input_ids)["logits"], labels)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(("world_size", "layout"), [(1, "zig_zag"), (2, "zig_zag"), (3, "contiguous"), (4, "zig_zag")])
@pytest.mark.parametrize("loss", [shifted_by_slicing, difference, without_the_first, twice_sliced])
def test_exact(loss: Loss, world_size: int, layout: str, dynamic: bool) -> None:
    model = Model(loss).double()
    inputs = batch(model, 33, seed=world_size)
    found = cpcompile.verify(
        model, inputs, world_size=world_size, dtype=torch.float64, balancer=layout, dynamic=dynamic
    )
    found.raise_if_wrong()


class PositionsFromABuffer(RotaryLM):
    """Looks learned positions up with a slice of a buffer of all positions, as BERT does."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Embedding(128, 32)
        self.register_buffer("position_ids", torch.arange(128)[None])

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        positions = self.positions(self.position_ids[:, : input_ids.shape[1]])
        return super().forward(labels=labels, inputs_embeds=self.embed(input_ids) + positions)


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_slice_of_a_whole_tensor(dynamic: bool) -> None:
    model = PositionsFromABuffer().double()
    found = cpcompile.verify(
        model, batch(model, 33), world_size=3, dtype=torch.float64, balancer="zig_zag", dynamic=dynamic
    )
    found.raise_if_wrong()


@pytest.mark.parametrize("cut", [lambda x, labels: x[:, :-1], lambda x, labels: x[:, 2:]])
def test_an_output_of_a_part_of_the_tokens_is_a_sequence(cut: Loss) -> None:
    model = Model(cut).double()
    cpcompile.verify(model, batch(model, 33), world_size=2, dtype=torch.float64).raise_if_wrong()
    assert "cp.rearrange_tokens" in cpcompile.explain(model, batch(model, 33), world_size=2).after


def test_an_output_of_more_than_the_tokens_is_refused() -> None:
    model = Model(lambda logits, labels: F.pad(logits, (0, 0, 1, 0)))
    with pytest.raises(cpcompile.NoRule, match=r"other tokens than the sequence has(.|\n)*pad after cpcompile.unshard"):
        cpcompile.verify(model, batch(model, 33), world_size=2)


def test_an_output_of_a_part_of_the_tokens_can_be_whole() -> None:
    model = Model(lambda logits, labels: logits[:, :-1]).double()
    cpcompile.verify(model, batch(model, 33), world_size=2, dtype=torch.float64, outputs="full").raise_if_wrong()


def test_placements_say_their_range() -> None:
    assert str(Sharded(1, front=1)) == "Sharded(1, tokens 1:)"
    assert str(Sharded(1, back=2)) == "Sharded(1, tokens 0:-2)"
    assert Sharded(1, front=1, back=2).count(10) == 7
