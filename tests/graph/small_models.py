"""A one-layer language model without casts, and what the tests of passes need of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from cpcompile.compile.transform import Transformed
from cpcompile.inspect.planned_step import plan_for
from cpcompile.options.config import Config
from cpcompile.passes import choose_strategies

VOCABULARY = 13


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class TinyLM(nn.Module):
    """Embedding, causal attention, a product, and a loss of logits and labels."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor] = mean_loss, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.loss = heads, loss
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, VOCABULARY)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        return self.head(x + self.attend(x))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.logits(input_ids), labels)


class Logits(TinyLM):
    """Returns no loss."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.logits(input_ids)


def batch(length: int = 8, size: int = 2) -> dict[str, Tensor]:
    """Return token ids and labels, some of them ignored, unequally over the sequence."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, VOCABULARY, (size, length), generator=generator)
    labels = torch.randint(0, VOCABULARY, (size, length), generator=generator)
    labels[0, : length // 3] = -100
    return {"input_ids": ids, "labels": labels}


def planned(model: nn.Module, inputs: dict[str, Any], world_size: int = 2, **options: Any) -> Transformed:
    """Return the plan and the graphs of `model`; sizes are numbers unless `dynamic=True`."""
    torch._dynamo.reset()  # else a length that differs from the last one is made symbolic
    config = Config.of({"dynamic": False, **options})
    return plan_for(model, inputs, world_size=world_size, config=config)


def before(transformed: Transformed, *passes: Callable[..., int]) -> fx.GraphModule:
    """Return the graph as a pass meets it, after `passes`."""
    gm = transformed.analysed
    choose_strategies(gm, strategies=transformed.choice.strategies)
    for earlier in passes:
        earlier(gm, plan=transformed.plan)
        gm.graph.eliminate_dead_code()
    return gm


def count(gm: fx.GraphModule, target: Any) -> int:
    """Return how many calls of `target` there are."""
    return len(gm.graph.find_nodes(op="call_function", target=target))
