"""Attention in the forms that models say it in: exact on several ranks, whether it is recognised or stays written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from cpcompile import verify
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.attention import attention
from cpcompile.inspect.first_difference import Difference, first_difference
from cpcompile.inspect.model_runs import LockstepBackend, default_objective, run_and_differentiate
from cpcompile.ir.annotation import annotation
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes.lift_masks import describe
from tests.graph.small_models import TinyLM, batch

LONGEST = 40
cp = torch.ops.cpcompile


class Attending(TinyLM):
    """Attends by a function of q, k and v `[B, H, S, D]`."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.attention(q, k, v).transpose(1, 2).flatten(-2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


def hidden(x: Tensor) -> Tensor:
    """Return where a key comes after a query."""
    return torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)


class Einsum(Attending):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5
        weights = scores.masked_fill(hidden(scores), -math.inf).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


class MaskOfABuffer(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(LONGEST, LONGEST).tril()[None, None])

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT / 2
        scores = scores.masked_fill(self.seen[:, :, : q.shape[2], : q.shape[2]] == 0, -math.inf)  # type: ignore[index]
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


class TrainedBias(Attending):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(2 * LONGEST, self.heads))

    def by_distance(self, length: int) -> Tensor:
        places = torch.arange(length)
        return self.bias[places[:, None] - places + LONGEST].permute(2, 0, 1)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.by_distance(q.shape[2]).masked_fill(hidden(q), -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias)


class TrainedBiasWrittenOut(TrainedBias):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT + self.by_distance(q.shape[2])
        return scores.masked_fill(hidden(q), -math.inf).softmax(-1) @ v


class Modules(TinyLM):
    """Attends by `torch.nn.MultiheadAttention`, which multiplies in three dims and adds its mask in the product."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.mixer = nn.MultiheadAttention(8, 2)
        self.need_weights = need_weights

    def attend(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[0], dtype=x.dtype)
        return self.mixer(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0].transpose(0, 1)


class Sinks(Attending):
    """Attends as gpt-oss does."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(self.heads))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT / 2).masked_fill(hidden(q), -math.inf)
        logits = torch.cat([scores, self.sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        logits = logits - logits.max(-1, keepdim=True).values
        return logits.softmax(-1)[..., :-1] @ v


class Masked(Attending):
    """Attends under a mask of the number of tokens."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, self.mask(places[:, None], places))


FORMS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "einsum": (Einsum, ["causal"]),
    "mask of a buffer": (MaskOfABuffer, ["causal"]),
    "trained bias": (TrainedBias, []),
    "trained bias written out": (TrainedBiasWrittenOut, []),
    "sinks": (Sinks, ["causal, sinks"]),
    "window on both sides": (lambda: Masked(lambda q, k: (q - k).abs() <= 2), ["look-ahead 2, window 3"]),
    "look-ahead": (lambda: Masked(lambda q, k: k - q < 4), ["look-ahead 3"]),
    "prefix": (lambda: Masked(lambda q, k: (k <= q) | (k < 4)), ["causal, prefix"]),
    "chunks": (lambda: Masked(lambda q, k: (k // 4 == q // 4) & (k <= q)), ["causal, documents"]),
    "module with weights": (lambda: Modules(True), ["causal"]),
    "module without weights": (lambda: Modules(False), ["causal"]),
}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", FORMS)
def test_forms_are_exact(name: str, world_size: int) -> None:
    make, expected = FORMS[name]
    found = verify(make(), batch(11), world_size=world_size, dtype=torch.float64)
    found.raise_if_wrong()
    words = [describe(node).split(" [")[0] for node in attention_nodes(found.transformed.analysed)]
    assert words == expected


class Flex(TrainedBias):
    """Attends by flex attention, which has no backward here; `reference` is the same by hand."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.by_hand = kind, False

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.reference(q, k, v) if self.by_hand else self.flex(q, k, v)

    def flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias, length = self.bias, q.shape[2]
        scores: dict[str, Any] = {
            "bias": lambda s, b, h, i, j: s + bias[i - j + LONGEST, h],
            "cubed": lambda s, b, h, i, j: s * s * s,
        }
        masks: dict[str, Any] = {
            "window": lambda b, h, i, j: (i >= j) & (i - j < 3),
            "empty rows": lambda b, h, i, j: i > j + 2,
        }
        seen = masks.get(self.kind, lambda b, h, i, j: i >= j)
        mask = create_block_mask(seen, None, None, length, length, device="cpu")
        return flex_attention(q, k, v, scores.get(self.kind), mask)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length = q.shape[2]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = {"window": (distance >= 0) & (distance < 3), "empty rows": distance > 2}.get(self.kind, distance >= 0)
        scores = q @ k.mT / 2
        if self.kind == "bias":
            scores = scores + self.by_distance(length)
        scores = scores**3 if self.kind == "cubed" else scores
        return torch.nan_to_num(scores.masked_fill(~seen, -1e300).softmax(-1)).mul(seen) @ v


@pytest.mark.parametrize("kind", ["window", "empty rows", "bias", "cubed"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_flex_attention_is_exact(kind: str) -> None:
    model, inputs, config = Flex(kind).double(), batch(11), Config()
    ranks = LockstepBackend(config, Axis.in_process(3), False)
    forward = compile_whole(model.forward, ranks, config)
    found = run_and_differentiate(model, forward, by_name(model.forward, inputs), default_objective, config)
    model.by_hand = True
    wanted = run_and_differentiate(model, model.forward, inputs, default_objective)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def difference(model: nn.Module) -> Difference | None:
    """Return where the forward values of three ranks first differ."""
    config = Config(strategy="gather")
    ranks = LockstepBackend(config, Axis.in_process(3), is_wide=True)
    forward = compile_whole(model.forward, ranks, config)
    run_and_differentiate(model, forward, by_name(model.forward, batch(11)), default_objective, config)
    assert ranks.transformed is not None
    return first_difference(model, ranks.transformed, ranks.inputs, 3, 1e-12)


# Of a product in three dims, or in another memory order, the first value that the model has too is compared.
LINES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "einsum": (Einsum, 'torch.einsum("bhqk,bkhd->bqhd", weights, v)'),
    "mask of a buffer": (MaskOfABuffer, ".to(v.dtype) @ v"),
    "sinks": (Sinks, "logits.softmax(-1)[..., :-1] @ v"),
    "prefix": (FORMS["prefix"][0], "F.scaled_dot_product_attention("),
    "module with weights": (FORMS["module with weights"][0], "self.mixer(x, x, x"),
    "flex": (lambda: Flex("window"), "flex_attention(q, k, v, scores.get("),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_wrong_attention_is_named_by_its_own_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(calls: list[Any]) -> list[Any]:
        return [(out + 1, *others) for out, *others in attention(calls)]

    make, line = LINES[name]
    model = make().double()
    assert difference(model) is None
    monkeypatch.setitem(COLLECTIVES, cp.gather_attention.default, broken)
    found = difference(model)
    assert found is not None
    assert line in found.place


def test_an_attention_that_is_written_out_is_compared() -> None:
    graph = verify(TrainedBias(), batch(11), world_size=2, dtype=torch.float64).transformed.graph.graph
    found = [node for node in graph.nodes if annotation(node).origin == "scaled_dot_product_attention"]
    assert [node.target for node in found] == [torch.ops.aten.matmul.default]
