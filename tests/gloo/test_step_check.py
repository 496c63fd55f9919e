"""`check_finite="step"` runs what is compiled, asks once, and runs a step that is not finite again: same error, on all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cpcompile
from cpcompile import NotFiniteError
from cpcompile.front import backend
from tests.gloo.test_check_finite import Rolled, Scaled
from tests.graph.small_models import TinyLM, batch
from tests.models import error, errors, gradients

EXACT = 1e-12  # float64
LENGTH = 11


def applied(rank: Any, model: TinyLM, inner: str = "eager", **options: Any) -> TinyLM:
    """Return a context-parallel model whose steps are checked."""
    torch._dynamo.reset()
    return cpcompile.apply(model, rank.mesh(), inner=inner, check_finite="step", balancer="contiguous", **options)


def last_is_zero() -> dict[str, Tensor]:
    """Return a batch of which only the last token, on the last rank, has the id 0."""
    data = batch(LENGTH, 1)
    data["input_ids"] = data["input_ids"].clamp(min=1)
    data["input_ids"][0, -1] = 0
    return data


def failure(run: Callable[[], object]) -> str:
    """Return the error of a step."""
    try:
        run()
    except NotFiniteError as found:
        return str(found)
    return ""


def stepped(rank: Any, bad: float, inner: str) -> tuple[str, float, list[str]]:
    """Return the error of a step, how far it is from one device, and which gradients there are after it."""
    model, alone, data = applied(rank, Scaled(bad).double(), inner), Scaled(bad).double(), last_is_zero()
    text = failure(lambda: model(**data).backward())
    left = [name for name, x in model.named_parameters() if x.grad is not None]
    if text:
        return text, 0.0, left
    model.zero_grad()
    loss, expected = model(**data), alone(**data)
    loss.backward()
    expected.backward()
    return text, max(error(loss.detach(), expected.detach()), *errors(gradients(model), gradients(alone)).values()), []


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("inner", ["aot_eager", "eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_value_ends_the_step_of_all_ranks(pool: Any, world_size: int, inner: str) -> None:
    for text, _, left in pool.run(world_size, stepped, -1.0, inner):
        ranks = "rank(s) 2 of 3: " if world_size == 3 else ""
        assert text.startswith(f"{ranks}the value of sqrt (aten.sqrt.default) is NaN.\n\n"), text
        assert "torch.sqrt(scale)" in text and "  add_1: float64" in text
        assert left == []


def test_a_gradient_ends_the_step_of_all_ranks(pool: Any) -> None:
    for text, _, left in pool.run(3, stepped, 0.0, "aot_eager"):
        assert text.startswith("rank(s) 2 of 3: the gradient of add"), text
        assert "is infinite, which backward of sqrt makes of finite gradients" in text and left == []


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_finite_step_is_that_of_one_device(pool: Any, inner: str) -> None:
    for text, difference, _ in pool.run(3, stepped, 2.0, inner):
        assert (text, difference < EXACT) == ("", True), (text, difference)


class Counted(TinyLM):
    """Drops, counts its calls in a buffer, and divides by what the buffer says is left."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.register_buffer("left", torch.tensor(float(left)))

    def logits(self, input_ids: Tensor) -> Tensor:
        self.left.sub_(1)
        x = F.dropout(self.embedding(input_ids), 0.5)
        return self.head(x + self.attend(x) / self.left)


def counted(rank: Any) -> tuple[str, float, bool, float]:
    """Return the error of the third step, the buffer after it, and what it has left of accumulated gradients and generators."""
    model = applied(rank, Counted(3), "aot_eager", exact_dropout=True)
    torch.manual_seed(7)
    data = batch(LENGTH, 1)
    for _ in range(2):
        model(**data).backward()
    before = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    loss = model(**data)
    state = torch.get_rng_state()
    text = failure(loss.backward)
    after = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    is_same = bool((torch.get_rng_state() == state).all())
    return text, float(model.left), is_same, max(errors(after, before).values())


def test_a_second_run_reads_what_the_first_has_read_and_leaves_nothing(pool: Any) -> None:
    for text, left, is_same, difference in pool.run(2, counted):
        assert "the value of div (aten.div.Tensor) is" in text and "self.attend(x) / self.left" in text, text
        assert (left, is_same, difference) == (0.0, True, 0.0)


def accumulated(rank: Any) -> str:
    """Return the error of a second micro-batch whose gradients are kept back."""
    model = applied(rank, Scaled(0.0).double(), "aot_eager")
    fine, bad = batch(LENGTH, 1), last_is_zero()
    fine["input_ids"] = fine["input_ids"].clamp(min=1)
    with cpcompile.no_sync(model):
        model(**fine).backward()
        return failure(lambda: model(**bad).backward())


def test_gradients_that_are_kept_back_are_checked(pool: Any) -> None:
    for text in pool.run(2, accumulated):
        assert text.startswith("rank(s) 1 of 2: the gradient of add"), text


class Masked(TinyLM):
    """Returns a score that the model has set to -inf beside the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.logits(input_ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss, torch.full((3,), float("-inf")) + loss


def masked(rank: Any) -> tuple[str, int]:
    """Return the error of two steps, and how often one ran a second time."""
    model = applied(rank, Masked(), "aot_eager")
    runs = []
    again = backend.StepCheck._run_again
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, backend.StepCheck, "_run_again", again)
        backend.StepCheck._run_again = lambda *given: runs.append(1) or again(*given)
        text = failure(lambda: [model(**batch(LENGTH, 1))[0].backward() for _ in range(2)])
    return text, len(runs)


def test_infinities_that_are_meant_are_learned(pool: Any) -> None:
    assert pool.run(2, masked) == [("", 1)] * 2


def evaluated(rank: Any) -> tuple[str, str]:
    """Return the errors of forwards without a gradient: of padding slots that mean nothing, and of a token."""
    rolled, scaled = applied(rank, Rolled()), Scaled(-1.0)
    with torch.no_grad():
        fine = failure(lambda: rolled(**batch(LENGTH, 1)))
        scaled = applied(rank, scaled)
        return fine, failure(lambda: scaled(**last_is_zero()))


def test_a_forward_without_gradients_is_checked(pool: Any) -> None:
    for fine, text in pool.run(3, evaluated):
        assert fine == "" and text.startswith("rank(s) 2 of 3: the value of sqrt"), (fine, text)


class Logits(TinyLM):
    """Returns the logits, of which the caller makes the loss."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.logits(input_ids)


def own_loss(rank: Any) -> str:
    model, data = applied(rank, Logits(), "aot_eager"), batch(LENGTH, 1)

    def step() -> None:
        logits = model(**data)
        cpcompile.cross_entropy(logits, data["labels"], model).mul(float("nan") if rank.rank else 1.0).backward()

    return failure(step)


def test_a_loss_behind_the_model_is_named(pool: Any) -> None:
    for text in pool.run(2, own_loss):
        assert "and no operator of the model makes it: the caller's own objective does" in text, text


def of_a_kernel(rank: Any) -> str:
    """Return the error of a compiled program that is not finite although its operators are."""
    model, data = applied(rank, TinyLM(), "aot_eager"), batch(LENGTH, 1)
    compile_inner = backend.compile_inner

    def broken(*given: Any, **named: Any) -> Callable[..., Any]:
        run = compile_inner(*given, **named)
        return lambda *inputs: tuple(x / 0 if x.is_floating_point() and rank.rank == 1 else x for x in run(*inputs))

    backend.compile_inner = broken
    try:
        return failure(lambda: model(**data).backward())
    finally:
        backend.compile_inner = compile_inner


def test_what_does_not_come_again_is_due_to_a_kernel(pool: Any) -> None:
    for text in pool.run(2, of_a_kernel):
        assert text.startswith("the compiled step is not finite: what the model returns is infinite on rank(s) 1, "), (
            text
        )
        assert "run again from the same inputs, operator by operator, every value and gradient is finite" in text
        assert "inner='aot_eager' has made computes it: try inner='eager'" in text
