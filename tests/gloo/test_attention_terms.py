"""Sinks, slopes, bands, prefixes and chunks of a model on gloo ranks: exact with every strategy, through Inductor as well."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from tests.models import error, errors, gradients

EXACT, VOCABULARY, HEADS = 1e-12, 13, 3


def sinks(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    scores = (q @ k.mT / 2).masked_fill(places > places[:, None], -math.inf)
    logits = torch.cat([scores, learned.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return (logits - logits.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def slopes(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    bias = (learned.detach().view(-1, 1, 1) * places).masked_fill(places > places[:, None], -math.inf)
    return F.scaled_dot_product_attention(q, k, v, bias)


def under(mask: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, learned: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, mask(places[:, None], places))

    return attention


FORMS: dict[str, Callable[..., Tensor]] = {
    "sinks": sinks,
    "slopes": slopes,
    "both sides": under(lambda q, k: (q - k).abs() <= 5),
    "prefix": under(lambda q, k: (k <= q) | (k < 7)),
    "chunks": under(lambda q, k: (k // 6 == q // 6) & (k <= q)),
}
MASKS = {
    "sinks": "causal, sinks",
    "slopes": "causal, ALiBi",
    "both sides": "look-ahead 5, window 6",
    "prefix": "causal, prefix",
    "chunks": "causal, documents",
}


class Model(nn.Module):
    """Embedding, two attentions of one form, and a loss."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.embedding = nn.Embedding(VOCABULARY, 4 * HEADS)
        self.qkv = nn.Linear(4 * HEADS, 12 * HEADS)
        self.learned = nn.Parameter(torch.rand(HEADS))
        self.head = nn.Linear(4 * HEADS, VOCABULARY)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(2):
            q, k, v = (t.unflatten(-1, (HEADS, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            x = x + FORMS[self.form](q, k, v, self.learned).transpose(1, 2).flatten(-2)
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def inputs_of(length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids, labels = torch.randint(0, VOCABULARY, (2, 2, length), generator=generator)
    return {"input_ids": ids, "labels": labels}


def trained(rank: Any, form: str, strategy: str, inner: str) -> dict[str, float]:
    """Return the errors at two lengths."""
    torch._dynamo.reset()
    alone, found = Model(form).double(), {}
    model = cpcompile.apply(Model(form).double(), rank.mesh(), inner=inner, strategy=strategy)
    for length in (31, 40):
        losses = [module(**inputs_of(length)) for module in (model, alone)]
        for loss in losses:
            loss.backward()
        found[f"loss at {length}"] = error(losses[0], losses[1])
        found |= {f"{key} at {length}": x for key, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize("form", FORMS)
def test_terms_are_found(form: str) -> None:
    plan = cpcompile.explain(Model(form).double(), inputs_of(31), world_size=2)
    assert {site.mask for site in plan.sites} == {MASKS[form]}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("strategy", "inner", "world_size"),
    [
        ("ring", "eager", 3),
        ("gather", "eager", 2),
        ("ulysses", "eager", 3),
        pytest.param("ring", "inductor", 2, marks=pytest.mark.slow),
        pytest.param("gather", "inductor", 2, marks=pytest.mark.slow),
        pytest.param("ulysses", "inductor", 2, marks=pytest.mark.slow),
    ],
)
def test_terms_of_models(pool: Any, form: str, strategy: str, inner: str, world_size: int) -> None:
    for found in pool.run(world_size, trained, form, strategy, inner, timeout=250):
        assert max(found.values()) < EXACT, found
