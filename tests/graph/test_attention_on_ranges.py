"""Attention on a range of the tokens, `x[:, 1:]`, with every kind of mask: exact on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import NoRule, explain, verify
from tests.graph.small_models import TinyLM, batch

LENGTH = 13
sdpa = F.scaled_dot_product_attention
Program = Callable[["Model", Tensor, Tensor], Tensor]


class Model(TinyLM):
    """Runs a program on the embedded tokens and the ids."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def of(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.program(self, self.embedding(input_ids), input_ids)


def distance(q: Tensor) -> Tensor:
    places = torch.arange(q.shape[2])
    return places[:, None] - places


def causal(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(*m.of(x[:, 1:]), is_causal=True)


def causal_without_both_ends(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(*m.of(x[:, 1:-2]), is_causal=True)


def everything(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(*m.of(x[:, 1:]))


def everything_before(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(*m.of(x[:, :-2]))


def window(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.of(x[:, 2:])
    return sdpa(q, k, v, (distance(q) >= 0) & (distance(q) < 3))


def padded_keys(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(*m.of(x[:, 1:]), (ids[:, 1:] > 2)[:, None, None])


def documents(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    number = (ids[:, 1:] < 4).cumsum(1)
    return sdpa(*m.of(x[:, 1:]), number[:, None, :, None] == number[:, None, None])


def slopes(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.of(x[:, 1:])
    return sdpa(q, k, v, -distance(q).abs() * torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None])


def dense(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.of(x[:, 1:])
    return sdpa(q, k, v, (distance(q) * distance(q).mT.abs()).to(x.dtype).sin()[None, None])


def written_out(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    q, k, v = m.of(x[:, 1:])
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(distance(q) < 0, -torch.inf)
    return scores.softmax(-1) @ v


def shifted_keys(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(m.of(x[:, 1:])[0], *m.of(x[:, :-1])[1:], is_causal=True)


def other_keys(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    return sdpa(m.of(x[:, 1:])[0], *m.of(x)[1:]).sum((2, 3)) + sdpa(m.of(x)[0], *m.of(x[:, 1:])[1:]).sum((2, 3))


def joined_again(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    y = sdpa(*m.of(x[:, 1:]), is_causal=True).transpose(1, 2).flatten(2)
    return F.cross_entropy(m.head(torch.cat([x[:, :1], y], 1) * x).flatten(0, 1), ids.flatten())


def of_one_token_fewer_each(m: Model, x: Tensor, ids: Tensor) -> Tensor:
    """Multi-token prediction: each further head attends over one token fewer."""
    y = x
    for depth in range(1, 3):
        y = y[:, :-1] + x[:, depth:]
        y = y + sdpa(*m.of(y), is_causal=True).transpose(1, 2).flatten(2)
    return F.cross_entropy(m.head(y[:, :-1]).flatten(0, 1), ids[:, 3:].flatten())


PROGRAMS: list[Program] = [
    causal,
    causal_without_both_ends,
    everything,
    everything_before,
    window,
    padded_keys,
    documents,
    slopes,
    dense,
    written_out,
    shifted_keys,
    other_keys,
    joined_again,
    of_one_token_fewer_each,
]


@pytest.mark.filterwarnings("ignore:1 attention.* use gather in place of ring")  # for an additive mask
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (2, {"strategy": "ulysses"}),
        (3, {"strategy": "ring", "balancer": "zig_zag"}),
        (4, {"strategy": "gather", "dynamic": False}),
    ],
)
def test_exact(program: Program, world_size: int, options: dict[str, object]) -> None:
    def squares(m: Model, x: Tensor, ids: Tensor) -> Tensor:
        return program(m, x, ids).pow(2).sum()

    inputs = {"input_ids": batch(LENGTH)["input_ids"]}
    found = verify(Model(squares), inputs, world_size=world_size, dtype=torch.float64, **options)
    assert found.ok, found
    assert not any(math.isnan(error) for error in found.gradient_errors.values()), found


def test_a_layout_that_follows_documents_returns_no_range() -> None:
    inputs = {"input_ids": batch(LENGTH)["input_ids"]}
    with pytest.raises(NoRule, match="an output holds other tokens than the sequence has") as error:
        explain(Model(documents), inputs, world_size=2, balancer="balanced")
    assert "number[:, None, :, None] == number[:, None, None]" in str(error.value)
