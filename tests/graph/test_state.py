"""What the forward writes: each rank its own, compared after the step, and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cpcompile import verify
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.state import State, own_inputs
from tests.graph.small_models import VOCABULARY, TinyLM, batch

DOUBLE = torch.float64


class Mixed(TinyLM):
    """Changes the hidden states, and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))
        self.steps, self.history = 0, list[Tensor]()

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.mix(self.embedding(input_ids))
        return self.head(x + self.attend(x))

    def mix(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Counter(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x / self.seen


class CounterBehind(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        out = x / (1 + self.seen)
        self.seen += 1
        return out


class Running(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
        return x - self.seen


class Replaced(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + x.detach().mean((0, 1))
        return x - self.seen


class Bias(Mixed):
    """Experts that had fewer tokens than others are preferred from now on."""

    def mix(self, x: Tensor) -> Tensor:
        chosen = ((x + self.seen).argmax(-1)[..., None] == torch.arange(8)).to(x.dtype)
        load = chosen.sum((0, 1))
        with torch.no_grad():
            self.seen += 0.1 * torch.sign(load.mean() - load)
        return x * (1 + chosen)


class Norm(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def mix(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class NormOfMeans(Norm):
    def mix(self, x: Tensor) -> Tensor:
        return x + self.norm(x.mean(1))[:, None]


class NormOfDrawn(Norm):
    """What ranks draw, each for itself, each normalises for itself."""

    def mix(self, x: Tensor) -> Tensor:
        noise = x.new_empty(x.shape[0], 8).normal_()
        return x + self.norm(x.mean(1) + noise)[:, None]


class Attributes(Mixed):
    def mix(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.history.append(x.mean())
        self.kept, self.training = x.mean(1), False
        return x * self.steps * len(self.history)


class Clipped(Mixed):
    """Cuts off what is large in a weight, behind autograd's back."""

    def mix(self, x: Tensor) -> Tensor:
        self.qkv.weight.data.clamp_(-0.1, 0.1)
        self.seen.data += 1
        return x / self.seen


class Weights(Mixed):
    """`max_norm` shortens the rows of the table that it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8, max_norm=0.5)

    def mix(self, x: Tensor) -> Tensor:
        return x


SEEN = {"seen": "seen"}
NORM = dict.fromkeys(("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"))
CHANGES: dict[type[Mixed], Any] = {
    **dict.fromkeys((Counter, CounterBehind, Running, Replaced, Bias), SEEN),
    **dict.fromkeys((Norm, NormOfMeans, NormOfDrawn), NORM),
    Attributes: {},
    Clipped: {**SEEN, "qkv.weight": ""},
    Weights: {"embedding.weight": ""},
}


def contents(model: Mixed) -> dict[str, Any]:
    return {name: value for name, value in vars(model).items() if not name.startswith("_")}


@pytest.mark.parametrize(("kind", "names"), CHANGES.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_ranks_agree_and_the_model_is_left_as_it_was(kind: type[Mixed], names: dict[str, str]) -> None:
    model, inputs = kind(), batch(16)
    before, held, objects = {n: x.clone() for n, x in model.state_dict().items()}, contents(model), dict(model._buffers)
    generator = torch.get_rng_state()
    for dtype in (None, DOUBLE):
        found = verify(model, inputs, world_size=3, dtype=dtype)
        found.raise_if_wrong()
        assert found.state_errors.keys() == names.keys()
    assert not names or f"  buffers    {len(names)} changed" in str(found)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert contents(model) == held and model.history == [] and model.training
    assert all(model._buffers[name] is x for name, x in objects.items())
    assert torch.equal(generator, torch.get_rng_state())


def test_the_model_is_left_as_it_was_when_it_is_refused() -> None:
    class Refused(Counter):
        def mix(self, x: Tensor) -> Tensor:
            return x + torch.trapezoid(super().mix(x), dim=1)[:, None]

    model = Refused()
    with pytest.raises(Exception, match=r"aten\.trapezoid"):
        verify(model, batch(), world_size=2)
    assert not model.seen.any()


def test_a_buffer_that_differs_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer is not read here, so that nothing else tells."""

    class Unread(Mixed):
        def mix(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.seen.copy_(x.mean((0, 1)))
            return x

    def own_sum_of_vectors(calls: list[Any]) -> list[Any]:
        return [c["x"] for c in calls] if calls[0]["x"].dim() else whole(calls)

    all_reduce = torch.ops.cpcompile.all_reduce.default
    whole = COLLECTIVES[all_reduce]
    monkeypatch.setitem(COLLECTIVES, all_reduce, own_sum_of_vectors)
    found = verify(Unread(), batch(16), world_size=2, dtype=DOUBLE)
    assert (found.verdict, found.loss_error < 1e-12, found.worst_gradient[1] < 1e-12) == ("WRONG", True, True)
    assert found.state_errors["seen"] > 0.1


def test_a_buffer_is_compared_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    all_reduce = torch.ops.cpcompile.all_reduce.default
    whole = COLLECTIVES[all_reduce]

    def wrong_on_the_last_rank(calls: list[Any]) -> list[Any]:
        return [*whole(calls)[:-1], 2 * whole(calls)[-1]] if calls[0]["x"].dim() else whole(calls)

    monkeypatch.setitem(COLLECTIVES, all_reduce, wrong_on_the_last_rank)
    found = verify(Running(), batch(16), world_size=2, dtype=DOUBLE)
    assert found.state_errors["seen"] > 0.1
    assert found.first_difference is not None and "x.mean((0, 1))" in found.first_difference.place


class Written(TinyLM):
    def forward(self, input_ids: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        input_ids[:, 0] = 1
        x = self.embedding(input_ids) * scale
        return self.loss(self.head(x + self.attend(x)), labels)


def test_inputs_are_compared_and_left_as_they_were() -> None:
    scale = torch.rand(2, 16, 8, requires_grad=True)
    inputs = {**batch(16), "scale": scale}
    ids = inputs["input_ids"].clone()
    found = verify(Written(), inputs, world_size=3, dtype=DOUBLE)
    found.raise_if_wrong()
    assert torch.equal(inputs["input_ids"], ids) and scale.grad is None
    assert found.state_errors == {"input input_ids": 0.0}
    assert found.gradient_errors["input scale"] < 1e-12 and len(found.gradient_errors) == 6


def test_copies_of_inputs_keep_what_is_one_tensor_one() -> None:
    x = torch.arange(3)
    own = own_inputs({"input_ids": x, "labels": x, "other": [x], "flag": True})
    assert own["labels"] is own["input_ids"] is own["other"][0] is not x
    assert own["flag"] is True


def test_what_is_unchanged_is_left_alone() -> None:
    """A restored tensor would have another version, which breaks a backward that the user has still to call."""
    model = Counter()
    state, versions = State(model), [p._version for p in model.parameters()]
    model.seen.add_(1)
    assert state.changes().keys() == {"seen"}
    state.restore()
    assert not state.changes() and [p._version for p in model.parameters()] == versions
