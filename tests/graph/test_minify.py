"""Minify finds a few calls that fail as the model does, and writes a file that shows it."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpcompile import CPError, NoRule, VerificationError, minify
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.program import Program, Ref, Source, Step
from tests.graph.small_models import TinyLM, batch


class Small(TinyLM):
    """No attention, so that a trial is quick."""

    def attend(self, x: Tensor) -> Tensor:
        return x.mul(2).tanh().exp()


class Refused(Small):
    """Takes the median over all tokens, in the middle of the model."""

    def attend(self, x: Tensor) -> Tensor:
        return (super().attend(x) + x.sin().median()).cos()


class Written(Small):
    """Has a buffer that it writes under no_grad, and reads before the refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(8))

    def attend(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count.add_(1)
        return x + (x * self.count).median()


def test_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "small.py"
    found = minify(Refused(), batch(6, size=1), world_size=2, path=path)
    assert (found.failure.kind, found.failure.operator) == ("NoRule", "aten.median")
    assert found.num_calls == 2, found.text  # a product, with which the stream begins, and the median
    assert found.text == path.read_text()
    assert f"torch {torch.__version__}" in found.text
    assert "torch.Generator().manual_seed(0)" in found.text
    with pytest.raises(NoRule, match=r"aten\.median"):
        runpy.run_path(str(path), run_name="__main__")


class Squared(torch.autograd.Function):
    """Computes its gradient itself, and takes a median for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * x.median()


class OwnBackward(Small):
    def attend(self, x: Tensor) -> Tensor:
        return Squared.apply(x)  # type: ignore[no-any-return]


def test_a_refusal_within_a_backward_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "small.py"
    found = minify(OwnBackward(), batch(6, size=1), world_size=2, path=path)
    assert (found.failure.kind, found.failure.operator) == ("NoRule", "aten.median")
    assert found.num_calls <= 3, found.text
    with pytest.raises(NoRule, match=r"aten\.median"):
        runpy.run_path(str(path), run_name="__main__")


def test_a_wrong_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.py"
    all_reduce = torch.ops.cpcompile.all_reduce.default
    monkeypatch.setitem(COLLECTIVES, all_reduce, lambda calls: [c["x"] for c in calls])
    found = minify(Small(), batch(6, size=1), world_size=2, dtype=torch.float64, path=path)
    assert found.failure.kind == "WRONG"
    assert found.num_calls <= 3, found.text
    with pytest.raises(VerificationError, match="WRONG"):
        runpy.run_path(str(path), run_name="__main__")
    monkeypatch.undo()
    runpy.run_path(str(path), run_name="__main__")


def test_writes_and_modes_of_the_model_are_left_out() -> None:
    found = minify(Written(), batch(6, size=1), world_size=2)
    assert found.num_calls <= 2, found.text
    assert "add_" not in found.text


def test_a_call_gives_way_to_its_operand() -> None:
    aten = torch.ops.aten
    x = Source("x", "input", torch.randn(2, 6, 4).requires_grad_(), 1)
    steps = (
        Step("sin", aten.sin.default, (Ref("x"),), {}, False),
        Step("mul", aten.mul.Tensor, (Ref("sin"), 2.0), {}, False),
    )
    program = Program((x,), steps, ("mul",)).without("sin", "x")
    module, inputs = program.build()
    assert [step.name for step in program.steps] == ["mul"]
    assert torch.equal(module(**inputs), x.value * 2)


def test_sizes_are_cut_with_their_multiples() -> None:
    """A size of 8 is merged with another one in 24; 6 is none of it."""
    x = Source("x", "input", torch.randn(3, 8, 6), 1)
    steps = (Step("flat", torch.ops.aten.reshape.default, (Ref("x"), [24, 6]), {}, False),)
    module, inputs = Program((x,), steps, ("flat",)).resized(8, 2).build()
    assert module(**inputs).shape == (6, 6)


def test_a_search_without_time_returns_the_whole_program() -> None:
    found = minify(Refused(), batch(6, size=1), world_size=2, seconds=0)
    assert (found.num_trials, "embedding.default" in found.text) == (1, True)


def test_what_is_exact_has_nothing_to_show() -> None:
    with pytest.raises(CPError, match="nothing is WRONG"):
        minify(Small(), batch(5), world_size=2)


def test_a_model_that_does_not_trace_has_no_graph() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(13, 4)

        def forward(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids).sum()
            return x * 2 if x.item() > 0 else x

    with pytest.raises(CPError, match="there is no graph to make smaller"):
        minify(Breaks(), {"input_ids": torch.zeros(1, 5, dtype=torch.int64)}, world_size=2)
