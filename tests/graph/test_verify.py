"""Verify says exact where the programs agree, and where they first differ otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import ConfigError, VerificationError, verify
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.attention import attention
from cpcompile.inspect.definitions.tokens import shard
from cpcompile.inspect.first_difference import value_error
from cpcompile.inspect.outcome import Outcome, gradient_errors
from cpcompile.passes import rewrite_reductions
from tests.graph.small_models import VOCABULARY, Logits, TinyLM, batch

DOUBLE = torch.float64
# The modules by their files: the package offers the functions under the same names.
reductions = __import__("sys").modules[rewrite_reductions.__module__]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [5, 31, 64])
def test_exact_for_every_length_and_number_of_ranks(length: int, world_size: int) -> None:
    for layout in ("contiguous", "zig_zag"):
        result = verify(TinyLM(), batch(length), world_size=world_size, dtype=DOUBLE, balancer=layout)
        result.raise_if_wrong()
        assert result.first_difference is None
        assert result.loss[0] == pytest.approx(result.reference_loss, rel=1e-12)
        assert set(result.gradient_errors) == {name for name, _ in TinyLM().named_parameters()}
        assert str(result).startswith(f"exact for {world_size} ranks, layout {layout}")


def flat(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def weights(logits: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, VOCABULARY, dtype=logits.dtype)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weighted": lambda x, y: flat(x, y, weight=weights(x)),
    "smoothed": lambda x, y: flat(x, y, label_smoothing=0.2),
    "weighted and smoothed": lambda x, y: flat(x, y, weight=weights(x), label_smoothing=0.2),
    "sum": lambda x, y: flat(x, y, reduction="sum"),
    "none, then divided by hand": lambda x, y: flat(x, y, reduction="none").sum() / (y != -100).sum(),
    "another ignored label": lambda x, y: flat(x, y.clamp(min=0), ignore_index=0),
    "classes in front": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "two losses": lambda x, y: flat(x, y) + 0.1 * x.logsumexp(-1).square().sum(),
}  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_exact_for_every_kind_of_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    verify(TinyLM(loss), batch(7), world_size=3, dtype=DOUBLE).raise_if_wrong()


def test_exact_for_probabilities() -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        likely = F.one_hot(labels.clamp(min=0), VOCABULARY).to(logits.dtype)
        return F.cross_entropy(logits.flatten(0, 1), likely.flatten(0, 1))

    verify(TinyLM(loss), batch(7), world_size=3, dtype=DOUBLE, dynamic=False).raise_if_wrong()


def test_exact_where_ranks_have_no_label() -> None:
    inputs = batch(16)
    inputs["labels"][:, 2:] = -100
    verify(TinyLM(), inputs, world_size=4, dtype=DOUBLE, balancer="contiguous").raise_if_wrong()


def test_fewer_tokens_than_ranks() -> None:
    verify(TinyLM(), batch(3), world_size=8, dtype=DOUBLE).raise_if_wrong()


def test_outputs_that_are_no_loss_are_projected() -> None:
    verify(Logits(), {"input_ids": batch(7)["input_ids"]}, world_size=3, dtype=DOUBLE).raise_if_wrong()


def test_objective_of_the_user_is_used() -> None:
    inputs = {"input_ids": batch(7)["input_ids"]}
    result = verify(Logits(), inputs, world_size=3, dtype=DOUBLE, objective=lambda x: x[:, 1:3].square().sum())
    result.raise_if_wrong()
    assert result.reference_loss == pytest.approx(Logits().double()(**inputs)[:, 1:3].square().sum().item())


def test_float32_is_measured_by_its_own_rounding() -> None:
    result = verify(TinyLM(), batch(31), world_size=4)
    result.raise_if_wrong()
    assert result.tolerance == 256 * torch.finfo(torch.float32).eps


def test_leaves_parameters_and_gradients_as_they_were() -> None:
    model = TinyLM()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    verify(model, batch(7), world_size=3)
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"head.weight"}
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))


class Dropped(TinyLM):
    """Drops values while it trains."""

    def attend(self, x: Tensor) -> Tensor:
        return F.dropout(super().attend(x), 0.5, self.training)


class DroppedWeights(TinyLM):
    """Drops attention weights."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("model", [Dropped, DroppedWeights])
def test_refuses_active_dropout(model: type[nn.Module]) -> None:
    with pytest.raises(VerificationError, match=r"dropout is active(.*\n)*.*test_verify.py(.*\n)*.*model.eval"):
        verify(model(), batch(), world_size=2)


def test_inactive_dropout_is_exact() -> None:
    verify(Dropped().eval(), batch(7), world_size=2, dtype=DOUBLE).raise_if_wrong()


def test_refuses_no_rank() -> None:
    with pytest.raises(ConfigError, match="world_size=0: there is at least one rank"):
        verify(TinyLM(), batch(), world_size=0)


# What follows breaks the transformation on purpose: verify must see it.


def test_sees_a_mean_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of the ranks' means, which the number of labels of each rank makes wrong."""
    monkeypatch.setattr(reductions, "MEANS", {})
    result = verify(TinyLM(), batch(16), world_size=2, dtype=DOUBLE)
    assert not result.ok
    assert result.first_difference is not None
    assert "mean_loss" not in result.first_difference.place
    assert "F.cross_entropy(logits.flatten(0, 1), labels.flatten())" in result.first_difference.place
    assert str(result).startswith("WRONG for 2 ranks")
    with pytest.raises(VerificationError, match="first diverging node: cross_entropy_loss"):
        result.raise_if_wrong()


def patched(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setitem(COLLECTIVES, getattr(torch.ops.cpcompile, name).default, value)


def first_ranks_tokens(calls: list[Any]) -> list[Any]:
    return [shard(calls)[0]] * len(calls)


def without_mask(calls: list[Any]) -> list[Any]:
    return attention([{**c, "is_causal": False} for c in calls])


def own_sum_only(calls: list[Any]) -> list[Any]:
    return [c["x"] for c in calls]


BROKEN = {
    "a shard of an input is dropped": (
        patched("shard_tokens", first_ranks_tokens),
        "from the input l_",
    ),
    "the mask is dropped": (patched("ring_attention", without_mask), "F.scaled_dot_product_attention"),
    "the sum is not summed": (patched("all_reduce", own_sum_only), "F.cross_entropy"),
}


@pytest.mark.parametrize(("how", "line"), BROKEN.values(), ids=BROKEN.keys())
def test_names_the_first_line_that_differs(
    how: Callable[[pytest.MonkeyPatch], None], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how(monkeypatch)
    result = verify(TinyLM(), batch(16), world_size=2, dtype=DOUBLE, strategy="ring")
    assert not result.ok
    assert result.first_difference is not None
    assert line in result.first_difference.place
    assert "from the input" in line or ".py:" in result.first_difference.place  # inputs have no line


def test_sees_gradients_that_are_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward value is right, so that only the gradients tell."""
    patched("scale_gradient", own_sum_only)(monkeypatch)
    result = verify(TinyLM(), batch(16), world_size=2, dtype=DOUBLE)
    assert not result.ok
    assert result.loss_error < result.tolerance
    assert result.first_difference is None
    assert result.worst_gradient[1] == pytest.approx(1.0)
    assert "every forward value agrees; 5 gradient(s) differ: embedding.weight" in str(result)


class Renormed(TinyLM):
    """An attention of tokens that are gathered for an operator without a rule."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2).renorm(2, 1, 0.5) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def test_says_how_attentions_are_computed_in_the_end() -> None:
    with pytest.warns(
        UserWarning, match=r"1 attention\(s\) run whole on every rank, since what they read is not sharded"
    ):
        whole = verify(Renormed(), batch(7), world_size=2, strict=False)
    assert str(whole).startswith("exact for 2 ranks, layout contiguous, attention whole on every rank (")
    assert ", attention ring (" in str(verify(TinyLM(), batch(7), world_size=2, strategy="ring"))


def test_nan_on_one_side_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    patched("all_reduce", lambda calls: [c["x"] * float("nan") for c in calls])(monkeypatch)
    result = verify(TinyLM(), batch(16), world_size=2, dtype=DOUBLE)
    assert not result.ok
    with contextlib.suppress(VerificationError):
        result.raise_if_wrong()
        pytest.fail("NaN passed")


def test_complex_values_are_widened() -> None:
    class Turned(TinyLM):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
            angles = torch.arange(x.shape[1]).float()[:, None] * torch.linspace(0.1, 1.0, pairs.shape[-1])
            turn = torch.polar(torch.ones_like(angles), angles).to(x.device)  # traced with its dtype
            y = torch.view_as_real(pairs * turn).flatten(-2).type_as(x)
            return F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())

    verify(Turned(), batch(13), world_size=2, dtype=DOUBLE).raise_if_wrong()


def test_error_of_values() -> None:
    one = torch.ones(4)
    assert value_error(one, one) == 0.0
    assert value_error(one * 1.5, one) == pytest.approx(0.5)
    assert value_error(one[:3], one) == float("inf")
    assert value_error(one * float("nan"), one) == float("inf")
    assert value_error(one * (1 + 0.5j), one + 0j) == pytest.approx(0.5)
    assert value_error(torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)) == float("inf")


def test_gradients_that_are_all_rounding_are_measured_against_the_loss() -> None:
    """As of a loss that only padding reaches: what cancels on one device cancels otherwise on ranks."""

    def outcome(gradient: float) -> Outcome:
        return Outcome([torch.tensor(0.7, dtype=DOUBLE)], {"weight": torch.tensor([gradient], dtype=DOUBLE)}, {})

    assert gradient_errors(outcome(1e-18), outcome(3e-18))["weight"] < 1e-15
    assert gradient_errors(outcome(1e-18), outcome(1e-6))["weight"] > 1e-5
    assert gradient_errors(outcome(1e-6), outcome(3e-6))["weight"] == pytest.approx(2)
