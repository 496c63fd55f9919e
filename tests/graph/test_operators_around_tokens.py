"""Operators beside the stream of tokens, as models use them: exact on any number of ranks, loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import verify
from tests.graph.small_models import TinyLM, batch

LENGTH = 13
INPUTS = batch(LENGTH)
WIDTH = 8


class Block(nn.Module):
    """A layer that is compiled once for all of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        q = self.linear(x).unflatten(-1, (2, -1)).transpose(1, 2)
        return x + F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)


Program = Callable[["Model", Tensor, Tensor], Tensor]


class Model(TinyLM):
    """Runs a program: from ids and labels to a loss."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program, self.blocks = program, nn.ModuleList([Block(), Block()])

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.program(self, input_ids, labels)


def experts_by_one_hot(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    scores = m.logits(ids)
    chosen = F.one_hot(scores.topk(2, -1).indices, scores.shape[-1]).sum(2)
    return (chosen * scores).pow(2).mean() + (F.one_hot(scores.argmax(-1), num_classes=13) * scores).sum()


def rows_of_a_split(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    first, second = m.logits(ids).flatten(0, 1).split(ids.shape[1])
    return (first.sin() * second).sum() + first.pow(2).mean()


def rows_of_a_chunk(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    first, second = m.logits(ids).flatten(0, 1).chunk(2)
    return F.mse_loss(first, second) + second.amax()


def rows_of_a_range(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    first, second = m.logits(ids)[:, 1:-1].flatten(0, 1).tensor_split(2)
    return F.mse_loss(first, second) + first.pow(2).sum()


def start_of_an_answer(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    scores = m.logits(ids)[..., 0]
    start = labels[:, -1].clamp(0, 5)
    start = torch.where(torch.arange(len(start)) == 0, start + 99, start).clamp(0, scores.size(1))
    return F.cross_entropy(scores, start, ignore_index=scores.size(1))


def start_in_a_range(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    scores, start = m.logits(ids)[:, 1:, 0], labels[:, -1].clamp(0, 5)
    smooth = F.cross_entropy(scores, start, reduction="sum", label_smoothing=0.1)
    return smooth + F.nll_loss(scores.log_softmax(-1), start, reduction="none").pow(2).sum()


def attention_under_vmap(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    q = m.embedding(ids).unflatten(-1, (2, 1, -1)).permute(2, 0, 3, 1, 4)
    return torch.vmap(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))(q).pow(2).sum()


def masked_attention_under_vmap(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    q = m.embedding(ids).unflatten(-1, (2, 1, -1)).permute(2, 0, 3, 1, 4)
    mask = (ids > 2)[:, None, None]
    return torch.vmap(lambda x: F.scaled_dot_product_attention(x, x, x, mask, scale=0.3))(q).pow(2).sum()


def nested_regions(m: Model, ids: Tensor, labels: Tensor) -> Tensor:
    x = m.embedding(ids)
    for block in m.blocks:
        x = block(x)
    return m.loss(m.head(x), labels)


PROGRAMS: list[Program] = [
    experts_by_one_hot,
    rows_of_a_split,
    rows_of_a_chunk,
    rows_of_a_range,
    start_of_an_answer,
    start_in_a_range,
    attention_under_vmap,
    masked_attention_under_vmap,
    nested_regions,
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch.vmap around an attention
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, {}),
        (2, {"balancer": "zig_zag"}),
        (3, {"balancer": "contiguous", "dynamic": False}),
        (4, {"balancer": "zig_zag", "strategy": "ring"}),
    ],
)
def test_exact(program: Program, world_size: int, options: dict[str, object]) -> None:
    found = verify(Model(program), INPUTS, world_size=world_size, dtype=torch.float64, **options)
    assert found.ok, found
