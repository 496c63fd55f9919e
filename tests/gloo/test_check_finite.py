"""`check_finite` ends a step on all ranks at its first value or gradient that is not finite, and names the ranks that have it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import cpcompile
from cpcompile import NotFiniteError
from tests.graph.small_models import VOCABULARY, TinyLM, batch
from tests.models import error, errors, gradients

EXACT = 1e-12  # float64
LENGTH = 11


class Scaled(TinyLM):
    """Scales each token by a root: of a negative number where `bad` says so, and of 0 for the slope."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(VOCABULARY))
        self.scale[0] = bad

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)  # is meant
        weights = (x @ x.transpose(1, 2) + mask).softmax(-1)
        scale = self.scale[input_ids].unsqueeze(-1) + 0 * x
        return self.head(x + self.attend(x) + weights @ torch.sqrt(scale))


def stepped(rank: Any, bad: float) -> tuple[str, float]:
    """Return the error of a step, or how far it is from one device, in which only the last token has the id 0."""
    torch._dynamo.reset()
    model, alone = Scaled(bad).double(), Scaled(bad).double()
    data = batch(LENGTH, 1)
    data["input_ids"] = data["input_ids"].clamp(min=1)
    data["input_ids"][0, -1] = 0
    cpcompile.apply(model, rank.mesh(), inner="eager", check_finite="operators", balancer="contiguous")
    try:
        loss = model(**data)
        loss.backward()
    except NotFiniteError as found:
        return str(found), 0.0
    expected = alone(**data)
    expected.backward()
    return "", max(error(loss.detach(), expected.detach()), *errors(gradients(model), gradients(alone)).values())


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_value_ends_the_step_of_all_ranks(pool: Any, world_size: int) -> None:
    for text, _ in pool.run(world_size, stepped, -1.0):
        ranks = "rank(s) 2 of 3: " if world_size == 3 else ""  # that of the last token
        assert text.startswith(f"{ranks}the value of sqrt (aten.sqrt.default) is NaN.\n\n"), text
        assert "torch.sqrt(scale)" in text
        operand = r"\n\nIt is computed from\n  add_1: float64 \[1, \d+, 8\], from -1 to 1, .*"  # and nothing of torch behind it
        assert re.fullmatch(r".*" + operand, text.partition("torch.sqrt(scale)")[2]), text


def test_a_gradient_ends_the_step_of_all_ranks(pool: Any) -> None:
    for text, _ in pool.run(3, stepped, 0.0):
        assert text.startswith("rank(s) 2 of 3: the gradient of add"), text
        assert "is infinite, which backward of sqrt makes of finite gradients" in text and "torch.sqrt(scale)" in text


def test_a_step_of_finite_numbers_is_that_of_one_device(pool: Any) -> None:
    for text, difference in pool.run(3, stepped, 2.0):
        assert (text, difference < EXACT) == ("", True), (text, difference)


class Rolled(TinyLM):
    """Divides what neighbours hand over, which is 0 in the slots behind a rank's tokens."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).roll(1, 1)
        return self.head(x / x.abs().sum(-1, keepdim=True) + self.attend(x))


def run_rolled(rank: Any) -> float:
    torch._dynamo.reset()
    model = Rolled()
    cpcompile.apply(model, rank.mesh(), inner="eager", check_finite="operators", balancer="contiguous")
    with torch.no_grad():
        return float(model(**batch(LENGTH, 1)))


def test_slots_behind_the_tokens_mean_nothing(pool: Any) -> None:
    with torch.no_grad():
        expected = float(Rolled()(**batch(LENGTH, 1)))
    assert pool.run(3, run_rolled) == pytest.approx([expected] * 3)


def test_what_is_compiled_is_not_checked() -> None:
    with pytest.raises(cpcompile.ConfigError, match="use inner='eager' with it"):
        cpcompile.Config(check_finite="operators")
