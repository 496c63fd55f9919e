"""What is NaN or infinite on one device proves nothing: verify says so, and where it begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import VerificationError, verify
from cpcompile.inspect.not_finite import kind_of
from tests.graph.small_models import TinyLM, batch, mean_loss


class Mixed(TinyLM):
    """Adds something to the hidden states, which subclasses make of them."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.attend(x) + self.added(x))

    def added(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Log(Mixed):
    def added(self, x: Tensor) -> Tensor:
        return torch.log(-x.square())


class Overflow(Mixed):
    """Infinity over infinity is NaN, but the fault is the exponential."""

    def added(self, x: Tensor) -> Tensor:
        large = torch.exp(x.square() * 1e6)
        return large / large


class BlindRows(Mixed):
    """Rows that see no key: -inf is meant, and softmax makes NaN of it."""

    def added(self, x: Tensor) -> Tensor:
        scores = (x @ x.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(0) > 0, float("-inf"))
        return (2 * scores).softmax(-1) @ x


class Root(Mixed):
    """The root of nothing is finite, and its slope is not."""

    def added(self, x: Tensor) -> Tensor:
        return torch.sqrt((x - x).square().sum(-1, keepdim=True))


class BadWeight(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)
        with torch.no_grad():
            self.gate.weight[0, 0] = float("nan")

    def added(self, x: Tensor) -> Tensor:
        return self.gate(x)


def infinite_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return mean_loss(logits, labels) + logits.square().sum() / 0.0


CASES = {
    "nan": (Log(), "NaN: the value of log", "return torch.log(-x.square())", "the loss"),
    "overflow": (Overflow(), "infinite: the value of exp", "large = torch.exp(x.square() * 1e6)", "the loss"),
    "rows that see nothing": (BlindRows(), "NaN: the value of softmax", "(2 * scores).softmax(-1) @ x", "the loss"),
    "infinite": (TinyLM(infinite_loss), "infinite: the value of div", "logits.square().sum() / 0.0", "the loss"),
    "gradient": (Root(), "NaN: the gradient of sqrt", "return torch.sqrt((x - x)", "embedding.weight"),
    "weight": (BadWeight(), "NaN: the value of gate.weight", "gate_parameters_weight", "the loss"),
}


@pytest.mark.parametrize(("model", "what", "line", "name"), CASES.values(), ids=CASES.keys())
def test_nothing_can_be_compared(model: TinyLM, what: str, line: str, name: str) -> None:
    found = verify(model, batch(), world_size=2)
    assert (found.ok, found.is_wrong, found.verdict) == (False, False, "nothing can be compared")
    assert found.not_finite is not None and found.not_finite.names[0] == name
    assert f"  first {what}\n" in str(found) and line in found.not_finite.place
    with pytest.raises(VerificationError, match="nothing can be compared for 2 ranks"):
        found.raise_if_wrong()
    assert not any(p._backward_hooks for p in model.parameters())


def test_gradients_that_are_finite_are_compared_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify(Root(), batch(), world_size=2).gradient_errors.keys() == {
        "qkv.weight", "qkv.bias", "head.weight", "head.bias"
    }  # fmt: skip
    from cpcompile.inspect.definitions import COLLECTIVES

    monkeypatch.setitem(COLLECTIVES, torch.ops.cpcompile.scale_gradient.default, lambda calls: [c["x"] for c in calls])
    found = verify(Root(), batch(), world_size=2)
    assert (found.verdict, found.ok) == ("WRONG", False)


def test_an_objective_that_is_not_finite_is_named() -> None:
    found = verify(TinyLM(), batch(), world_size=2, objective=lambda loss: loss * float("inf"))
    assert found.not_finite is not None and "the objective makes infinite of them" in str(found)


def test_a_loss_of_no_label_is_no_verdict() -> None:
    inputs = batch()
    inputs["labels"].fill_(-100)
    found = verify(TinyLM(), inputs, world_size=2)
    assert found.verdict == "nothing can be compared"
    assert found.not_finite is not None and "F.cross_entropy" in found.not_finite.place


def test_an_infinity_of_all_ranks_is_no_difference_of_a_finite_loss() -> None:
    """Masks of -inf are everywhere, and no fault."""

    class Masked(Mixed):
        def added(self, x: Tensor) -> Tensor:
            scores = (x @ x.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1) > 0, float("-inf"))
            return F.softmax(scores, -1) @ x

    assert verify(Masked(), batch(), world_size=2).verdict == "exact"


def test_kinds() -> None:
    assert [kind_of(torch.tensor(x)) for x in (1.0, float("inf"), float("nan"), 3)] == ["", "infinite", "NaN", ""]
