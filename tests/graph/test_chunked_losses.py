"""Losses in chunks of tokens: every spelling is exact, and what is no sum over rows stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cpcompile import ConfigError, verify
from cpcompile.options.config import Config
from cpcompile.runtime.tiles import chunked_loss
from cpcompile.runtime.tiles.loss_body import Body, Result, add_body
from tests.graph.small_models import VOCABULARY, TinyLM, batch, count, mean_loss, planned

CHUNKED = torch.ops.cpcompile.chunked_loss.default
WEIGHTS = torch.linspace(0.5, 2, VOCABULARY, dtype=torch.float64)
Loss = Callable[[Tensor, Tensor], Tensor]


def shifted_by_slice(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def shifted_by_pad(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.view(-1, VOCABULARY), F.pad(y, (0, 1), value=-100)[..., 1:].reshape(-1))


def cast(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.to(torch.float64).flatten(0, 1), y.flatten())


def softcapped(z: Tensor, y: Tensor) -> Tensor:
    return mean_loss(3.0 * torch.tanh(z / 3.0), y)


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(0.7 * z.flatten(0, 1), y.flatten(), label_smoothing=0.1)


def of_weighted_classes(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=WEIGHTS)


def with_z_loss(z: Tensor, y: Tensor) -> Tensor:
    return mean_loss(z, y) + 1e-2 * z.logsumexp(-1).pow(2).mean()


def of_weighted_tokens(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
    importance = 1 + (y % 3).to(z.dtype)
    return (each * importance).sum() / importance.sum()


def by_log_softmax(z: Tensor, y: Tensor) -> Tensor:
    picked = F.log_softmax(z, dim=-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -(picked * (y != -100)).sum() / (y != -100).sum()


def by_nll(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(z, -1).flatten(0, 1), y.flatten(), ignore_index=-100)


def by_num_items(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / 37


def entropy_too(z: Tensor, y: Tensor) -> Tensor:
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    return mean_loss(z, y) - 0.1 * entropy.mean()


def focal(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    return ((1 - torch.exp(-each)) ** 2 * each).sum()


def focal_without_gradient(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    with torch.no_grad():
        weight = (1 - torch.exp(-each)) ** 2
    return (weight * each).sum()


def scaled_by_a_detached_mean(z: Tensor, y: Tensor) -> Tensor:
    return mean_loss(z, y) * (1 + z.detach().logsumexp(-1).mean())


def with_what_is_alike(z: Tensor, y: Tensor) -> Tensor:
    each = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none")
    return each.sum() + 2 * torch.ones_like(each).sum()


def by_parts(z: Tensor, y: Tensor) -> Tensor:
    few, many = z.split([5, VOCABULARY - 5], -1)
    return ((few.logsumexp(-1) - many.logsumexp(-1)) * (y != -100)).sum()


LOSSES: list[Loss] = [
    mean_loss,
    shifted_by_slice,
    shifted_by_pad,
    cast,
    softcapped,
    smoothed,
    of_weighted_classes,
    with_z_loss,
    of_weighted_tokens,
    by_log_softmax,
    by_nll,
    by_num_items,
    entropy_too,
    focal,
    focal_without_gradient,
    scaled_by_a_detached_mean,
    with_what_is_alike,
    by_parts,
]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_every_spelling_is_exact(loss: Loss, world_size: int) -> None:
    options: dict[str, Any] = {"loss_chunk": 3}
    model, inputs = TinyLM(loss).double(), batch(11)
    assert count(planned(model, inputs, world_size, **options).graph, CHUNKED) == 1
    found = verify(model, inputs, world_size=world_size, dtype=torch.float64, **options)
    assert found.tolerance < 1e-12
    found.raise_if_wrong()


class HeadOf(TinyLM):
    """A head that is spelled or shared otherwise."""

    def __init__(self, spelling: str) -> None:
        super().__init__(shifted_by_pad)
        self.spelling = spelling

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(x)
        if self.spelling == "tied":
            return F.linear(x, self.embedding.weight)
        if self.spelling == "matmul":
            return x @ self.embedding.weight.T
        if self.spelling == "flat":
            return self.head(x.flatten(0, 1)).view(*x.shape[:-1], VOCABULARY)
        if self.spelling == "no bias":
            return F.linear(x, self.head.weight)
        if self.spelling == "two heads":
            return self.head(x) + 0 * F.linear(x, self.embedding.weight)
        raise AssertionError


@pytest.mark.parametrize(
    ("spelling", "is_chunked"),
    [("tied", True), ("matmul", True), ("no bias", True), ("flat", True), ("two heads", False)],
)
def test_heads(spelling: str, is_chunked: bool) -> None:
    model = HeadOf(spelling).double()
    assert count(planned(model, batch(11), loss_chunk=4).graph, CHUNKED) == is_chunked
    verify(model, batch(11), world_size=2, dtype=torch.float64, loss_chunk=4).raise_if_wrong()


class Both(TinyLM):
    """Returns logits beside the loss, as transformers do; `made` of them."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.logits(input_ids)
        return self.loss(z, labels), self.made(z)


@pytest.mark.parametrize(
    ("made", "options", "is_chunked"),
    [
        (lambda z: z, {}, True),
        (lambda z: 3 * torch.tanh(z / 3), {}, True),
        (lambda z: z, {"logits": "keep"}, False),
        (lambda z: z, {"outputs": "full"}, False),
        (lambda z: z, {"loss_chunk": 0}, False),
        (lambda z: z.argmax(-1), {}, True),
        (lambda z: z.logsumexp(-1), {}, True),
        (lambda z: z.flatten(0, 1).logsumexp(-1).view(z.shape[:2]), {}, True),
        (lambda z: z.cumsum(-1), {}, False),
    ],
    ids=["logits", "softcapped", "kept", "full", "off", "argmax", "rows", "flat rows", "cumsum"],
)
def test_logits_that_are_returned(made: Any, options: dict[str, Any], is_chunked: bool) -> None:
    model, options = Both(made).double(), {"loss_chunk": 4, **options}
    assert count(planned(model, batch(11), **options).graph, CHUNKED) == is_chunked
    verify(model, batch(11), world_size=2, dtype=torch.float64, **options).raise_if_wrong()


class Tempered(TinyLM):
    """Its logits are divided by a parameter, which gets a gradient of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def logits(self, input_ids: Tensor) -> Tensor:
        return super().logits(input_ids) / self.temperature


def test_a_gradient_that_a_chunk_does_not_give() -> None:
    model = Tempered().double()
    assert count(planned(model, batch(11), loss_chunk=4).graph, CHUNKED) == 0
    verify(model, batch(11), world_size=2, dtype=torch.float64, loss_chunk=4).raise_if_wrong()


def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("gradients were computed")

    monkeypatch.setattr(chunked_loss, "loss_and_gradients", refuse)
    hidden, weight = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    body = fx.symbolic_trace(lambda z, y: (F.cross_entropy(z, y, reduction="sum"),))
    key = add_body(Body(body, (Result(None, torch.float32, True),)))
    labels = torch.tensor([0, 1, 2, -100, 4])
    with torch.no_grad():
        (found,) = torch.ops.cpcompile.chunked_loss(hidden, weight, None, [labels], [], key, 2, False)
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, labels, reduction="sum").detach())
    with pytest.raises(AssertionError, match="gradients were computed"):
        torch.ops.cpcompile.chunked_loss(hidden, weight, None, [labels], [], key, 2, False)


def test_a_body_is_compiled_for_each_dtype() -> None:
    body = Body(fx.symbolic_trace(lambda z: (z.float().logsumexp(-1).sum(),)), (Result(None, torch.float32, True),))
    for dtype in (torch.float32, torch.bfloat16):
        body.compile(torch.empty(4, 5, dtype=dtype), [], [], {})
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(9, 5).to(dtype)
        expected = logits.float().softmax(-1)
        body.step(True, logits, [torch.ones(())], [], [])
        torch.testing.assert_close(logits.float(), expected, rtol=2**-7, atol=2**-8)  # bfloat16 has 8 bits


def test_the_option_is_checked() -> None:
    with pytest.raises(ConfigError, match="loss_chunk=-1 is not a number of tokens"):
        Config(loss_chunk=-1)
    with pytest.raises(ConfigError, match="logits='drop' is not an option"):
        Config(logits="drop")


def scaled_without_gradient(z: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = 1 + z.logsumexp(-1).mean()
    return mean_loss(z, y) * scale


def test_logits_that_are_read_where_gradients_are_off_are_left_alone() -> None:
    model = TinyLM(scaled_without_gradient).double()
    assert count(planned(model, batch(11), loss_chunk=4).graph, CHUNKED) == 0
    verify(model, batch(11), world_size=2, dtype=torch.float64, loss_chunk=4).raise_if_wrong()
