"""`show` prints a value and its gradient, on one device and on ranks, which print the tokens that they hold."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import cpcompile
from cpcompile.runtime.tokens.show import runs, summary
from tests.graph.small_models import TinyLM, batch, count, planned
from tests.models import error, errors, gradients

cp = torch.ops.cpcompile
EXACT = 1e-12  # float64
LENGTH = 11


class Shown(TinyLM):
    """Shows hidden states and the loss."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = cpcompile.show(self.embedding(input_ids), "hidden", gradient=True)
        return self.head(x + self.attend(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return cpcompile.show(super().forward(input_ids, labels), "loss")


def step(model: TinyLM) -> tuple[Tensor, list[str]]:
    """Return the loss of a step, and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        loss = model(**batch(LENGTH, 1))
        loss.backward()
    return loss.detach(), printed.getvalue().splitlines()


def shown(rank: Any, inner: str) -> tuple[float, list[str], list[str]]:
    """Return how far a step is from one device, and what both print."""
    torch._dynamo.reset()
    model, alone = Shown().double(), Shown().double()
    cpcompile.apply(model, rank.mesh(), inner=inner, balancer="zig_zag")
    (loss, printed), (expected, of_one) = step(model), step(alone)
    difference = max(error(loss, expected), *errors(gradients(model), gradients(alone)).values())
    return difference, printed, of_one


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_each_rank_prints_its_tokens(pool: Any, inner: str) -> None:
    """Of 11 tokens in 4 chunks of 3, the last one is of 2: rank 0 holds 5 and a slot of padding."""
    for rank, (difference, printed, of_one) in enumerate(pool.run(2, shown, inner)):
        assert difference < EXACT
        tokens, size = [("0:3 9:11", 5), ("3:9", 6)][rank]
        expected = [
            rf"hidden, rank {rank}, tokens {tokens} of 11 along dim 1: float64 \[1, {size}, 8\], from .*",
            rf"loss, rank {rank}: float64 \[\], from (\S+) to \1, mean \1, first \1",
            rf"gradient of hidden, rank {rank}, tokens {tokens} of 11 along dim 1: float64 \[1, {size}, 8\], from .*",
        ]
        for line, pattern in zip(printed, expected, strict=True):
            assert re.fullmatch(pattern, line), line
        assert printed[1] == of_one[1]  # the loss of the whole
        assert "float64 [1, 11, 8]" in of_one[0] and of_one[2].startswith("gradient of hidden, ")


def test_what_is_verified_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cpcompile.verify(Shown(), batch(LENGTH), world_size=3, dtype=torch.float64).ok
    assert capsys.readouterr().out == ""


def test_the_pass_locates_tokens_only() -> None:
    found = planned(Shown(), batch())
    assert found.changes["locate_shown"] == 1
    assert (count(found.graph, cp.show_tokens.default), count(found.graph, cp.show.default)) == (1, 1)
    assert planned(TinyLM(), batch()).changes["locate_shown"] == 0


def test_texts() -> None:
    assert runs(torch.tensor([0, 1, 2, 6, 8, 9])) == "0:3 6:7 8:10"
    assert runs(torch.arange(0, 20, 2)) == "0:1 2:3 4:5 6:7 ..."
    assert runs(torch.tensor([], dtype=torch.int64)) == "none"
    x = torch.tensor([1.0, float("nan"), 3.0])
    assert summary(x) == "float32 [3], from 1 to 3, mean 2, first 1 nan 3, 1 NaN or infinite"
    assert summary(torch.tensor([True, False])) == "bool [2], from 0 to 1, mean 0.5, first 1 0"
    assert summary(torch.zeros(0, 2)) == "float32 [0, 2]"
