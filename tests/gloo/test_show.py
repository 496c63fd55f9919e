"""`show` prints a value and its gradient, on one device and on ranks, which print the tokens that they hold."""

from __future__ import annotations

import contextlib
import io
import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import cpcompile
from cpcompile.runtime.tokens import pause
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


class Paused(TinyLM):
    """Stops at hidden states, at their gradient, and at the loss."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = cpcompile.show(self.embedding(input_ids), "hidden", gradient=True, pause=True)
        return self.head(x + self.attend(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return cpcompile.show(super().forward(input_ids, labels), "loss", pause=True)


class SlowUser(io.StringIO):
    """Types a line after half a second."""

    def readline(self, *size: Any) -> str:
        time.sleep(0.5)
        return super().readline(*size)


def paused(rank: Any, inner: str, typed: str) -> tuple[float, str, str, float]:
    """Return how far a step is from one device, what a user reads, the error, and the seconds that it took."""
    torch._dynamo.reset()
    model, alone = Paused().double(), TinyLM().double()
    cpcompile.apply(model, rank.mesh(), inner=inner, balancer="zig_zag")
    read = io.StringIO()
    saved, pause.terminal = pause.terminal, lambda: None
    pause._said.clear()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        step(model)  # compiles
    assert said.getvalue().count("this process has no terminal, so that nothing stops at 'hidden'") == (rank.rank == 0)
    model.zero_grad()
    user = SlowUser(typed)
    pause.terminal = lambda: (user, read)  # type: ignore[assignment,return-value]
    start, text = time.monotonic(), ""
    try:
        loss, _ = step(model)
    except cpcompile.DebuggerQuit as error_of_user:
        return 0.0, read.getvalue(), str(error_of_user), time.monotonic() - start
    finally:
        pause.terminal = saved
    seconds = time.monotonic() - start
    expected, _ = step(alone)
    difference = max(error(loss, expected), *errors(gradients(model), gradients(alone)).values())
    return difference, read.getvalue(), text, seconds


@pytest.mark.parametrize("inner", ["eager", pytest.param("aot_eager", marks=pytest.mark.always)])
def test_the_first_rank_stops_and_the_others_wait(pool: Any, inner: str) -> None:
    typed = "p tuple(value.shape), tokens.tolist(), rank\nc\np value.item()\nc\np value.shape[1]\nc\n"
    (difference, read, _, _), (other, nothing, _, seconds) = pool.run(2, paused, inner, typed)
    assert max(difference, other) < EXACT
    assert "(hidden) ((1, 5, 8), [0, 1, 2, 9, 10], 0)" in read
    assert re.search(r"\(loss\) \d+\.\d+", read) and "(gradient of hidden) 5" in read
    assert not nothing and seconds > 2.0  # five lines of a slow user


def test_quit_ends_all_ranks(pool: Any) -> None:
    for _, _, text, _ in pool.run(2, paused, "eager", "c\nq\n"):
        assert text == "the debugger that cpcompile.show had opened at 'loss' was ended with quit."


def test_one_device_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    read = io.StringIO()
    monkeypatch.setattr(pause, "terminal", lambda: (io.StringIO("p tokens\nc\n"), read))
    step(Paused())
    assert read.getvalue().count("None") == 3
    monkeypatch.setattr(pause, "terminal", lambda: (io.StringIO("q\n"), read))
    with pytest.raises(cpcompile.DebuggerQuit, match="at 'hidden'"):
        step(Paused())


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
