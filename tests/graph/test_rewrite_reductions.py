"""Means over the tokens become local sums over the count of all ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.ir.annotation import annotation
from cpcompile.ir.placement import Partial
from cpcompile.passes import place_tokens, rewrite_reductions
from tests.graph.small_models import VOCABULARY, TinyLM, batch, before, count, mean_loss, planned

aten, cp = torch.ops.aten, torch.ops.cpcompile


def weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, VOCABULARY, dtype=logits.dtype)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight, label_smoothing=0.1)


def nll_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(logits.log_softmax(-1).transpose(1, 2), labels)


def mean_of_squares(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.square().mean()


def mean_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.mean(1).square().sum()


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def mean_of_features(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.mean(-1).square().sum()


MEANS = [mean_loss, weighted_loss, nll_loss, mean_of_squares, mean_of_tokens]
NO_MEANS = [sum_loss, mean_of_features]


@pytest.mark.parametrize("loss", MEANS)
def test_rewrites_means_over_tokens(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    transformed = planned(TinyLM(loss), batch())
    gm = before(transformed, place_tokens)
    assert rewrite_reductions(gm, plan=transformed.plan) == 1
    assert count(gm, aten.mean.default) == count(gm, aten.mean.dim) == 0
    (quotient,) = gm.graph.find_nodes(op="call_function", target=aten.div.Tensor)
    assert annotation(quotient).placement == Partial()
    assert annotation(quotient).origin


@pytest.mark.parametrize("loss", NO_MEANS)
def test_leaves_sums_and_other_dims_alone(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    transformed = planned(TinyLM(loss), batch())
    gm = before(transformed, place_tokens)
    text = gm.graph.python_code("self").src
    assert rewrite_reductions(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


@pytest.mark.parametrize("loss", [*MEANS, *NO_MEANS])
@pytest.mark.parametrize(("length", "world_size"), [pytest.param(8, 2, marks=pytest.mark.slow), (7, 3)])
def test_keeps_numerics(loss: Callable[[Tensor, Tensor], Tensor], length: int, world_size: int) -> None:
    result = verify(TinyLM(loss), batch(length), world_size=world_size, dtype=torch.float64, dynamic=False)
    assert result.ok, result


@pytest.mark.parametrize("loss", [mean_loss, weighted_loss, nll_loss])
def test_keeps_numerics_of_losses_of_any_length(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    result = verify(TinyLM(loss), batch(7), world_size=3, dtype=torch.float64)
    assert result.ok, result


@pytest.mark.parametrize("loss", [mean_of_squares, mean_of_tokens])
def test_keeps_numerics_of_means_of_any_length(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    result = verify(TinyLM(loss), batch(7), world_size=3, dtype=torch.float64)
    assert result.ok, result


@pytest.mark.parametrize("loss", MEANS)
def test_second_run_changes_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    transformed = planned(TinyLM(loss), batch())
    gm = before(transformed, place_tokens, rewrite_reductions)
    text = gm.graph.python_code("self").src
    assert rewrite_reductions(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text
