"""A bias of slopes and positions becomes slopes of the attention where it is one; every other stays dense."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.ir.operator_call import Call
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.lift_masks import describe, lift_masks
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_find_attention import H, S, captured, operands

SLOPES = torch.tensor([0.5, 0.3, 0.7, 0.11], dtype=torch.float64)


def hidden(diagonal: int = 1) -> Tensor:
    """Return which keys are so many places or more after a query."""
    return torch.ones(S, S, dtype=torch.bool).triu(diagonal)


def places(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the places of queries and keys, to broadcast."""
    at = torch.arange(S)
    return at[:, None].to(dtype), at.to(dtype)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias)


def slopes_times(x: Tensor, slopes: Tensor) -> Tensor:
    return slopes[:, None, None] * x


def mpt(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    alibi = torch.arange(1 - S, 1, dtype=torch.int32).view(1, 1, 1, S) * s.view(1, H, 1, 1)
    scores = q @ k.mT * 0.3 + alibi.squeeze(0)
    return scores.masked_fill(hidden(), torch.finfo(scores.dtype).min).softmax(-1) @ v


def distances() -> Tensor:
    q, k = places()
    return k - q


Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
FORMS: dict[str, tuple[str, Form]] = {
    "mpt": ("causal, ALiBi", mpt),
    "filled": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(q, k, v, slopes_times(distances(), s).masked_fill(hidden(), -math.inf)),
    ),
    "where": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(q, k, v, torch.where(~hidden(), slopes_times(distances(), s), -math.inf)),
    ),
    "added": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(
            q, k, v, slopes_times(distances(), s) + torch.where(~hidden(), 0.0, -math.inf).double()
        ),
    ),
    "of keys alone": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(q, k, v, slopes_times(places()[1][None], s).masked_fill(hidden(), -math.inf)),
    ),
    "with a number for each row": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(
            q, k, v, slopes_times(2 * places()[1] - 7 * places()[0], s).masked_fill(hidden(), -math.inf)
        ),
    ),
    "of a batch": (
        "causal, ALiBi",
        lambda q, k, v, s: sdpa(
            q, k, v, slopes_times(distances(), s)[None].expand(2, H, S, S).masked_fill(hidden(), -math.inf)
        ),
    ),
    "distance": ("ALiBi", lambda q, k, v, s: sdpa(q, k, v, -slopes_times(distances().abs(), s))),
    "distance of integers": (
        "look-ahead 2, ALiBi",
        lambda q, k, v, s: sdpa(
            q,
            k,
            v,
            slopes_times(-(torch.arange(S)[:, None] - torch.arange(S)).abs(), s).masked_fill(hidden(3), -math.inf),
        ),
    ),
    "sinks": (
        "causal, ALiBi, sinks",
        lambda q, k, v, s: (
            torch.cat(
                [
                    (q @ k.mT + slopes_times(distances(), s)).masked_fill(hidden(), -math.inf),
                    s.view(1, H, 1, 1).expand(2, H, S, 1),
                ],
                -1,
            ).softmax(-1)[..., :-1]
            @ v
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_slopes_are_found(name: str) -> None:
    expected, form = FORMS[name]
    gm, args = captured(form, *operands(), SLOPES)
    assert (find_attention(gm), lift_masks(gm)) == (1, 1)
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    (node,) = attention_nodes(gm)
    assert describe(node) == expected
    (found,) = gm(*args)
    wanted = form(*operands(), SLOPES)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    text = str(gm.graph)
    assert (find_attention(gm), lift_masks(gm), str(gm.graph)) == (0, 0, text)


def rounded(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    bias = (s.float()[:, None, None] * distances().float()).double()
    return sdpa(q, k, v, bias.masked_fill(hidden(), -math.inf))


OTHERS: dict[str, Form] = {
    "rounded": rounded,
    "seen on both sides": lambda q, k, v, s: sdpa(q, k, v, slopes_times(distances(), s)),
    "ahead": lambda q, k, v, s: sdpa(q, k, v, slopes_times(distances(), s).masked_fill(hidden(2), -math.inf)),
    "squares": lambda q, k, v, s: sdpa(q, k, v, slopes_times(distances().square(), s).masked_fill(hidden(), -math.inf)),
    "slopes of queries": lambda q, k, v, s: sdpa(
        q, k, v, (F.pad(s, (0, 2))[:, None] * distances()).masked_fill(hidden(), -math.inf)
    ),
    "slopes of keys": lambda q, k, v, s: sdpa(
        q, k, v, (F.pad(s, (0, 2)) * distances()).masked_fill(hidden(), -math.inf)
    ),
    "two slopes": lambda q, k, v, s: sdpa(
        q,
        k,
        v,
        (slopes_times(distances(), s) + slopes_times(places()[1][None], s * s)).masked_fill(hidden(), -math.inf),
    ),
    "shown with a number": lambda q, k, v, s: sdpa(q, k, v, slopes_times(distances(), s).masked_fill(hidden(), -9.0)),
    "a far distance": lambda q, k, v, s: sdpa(q, k, v, -slopes_times((distances() - 1).abs(), s)),
    "rows beside sinks": lambda q, k, v, s: (
        torch.cat(
            [
                (q @ k.mT + slopes_times(places()[1][None], s)).masked_fill(hidden(), -math.inf),
                s.view(1, H, 1, 1).expand(2, H, S, 1),
            ],
            -1,
        ).softmax(-1)[..., :-1]
        @ v
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_stay_dense(name: str) -> None:
    gm, _ = captured(OTHERS[name], *operands(), SLOPES)
    assert find_attention(gm) == 1
    text = str(gm.graph)
    assert (lift_masks(gm), str(gm.graph)) == (0, text)


def test_slopes_of_half_precision_steps_stay_dense() -> None:
    def form(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        return sdpa(q, k, v, (s[:, None, None] * distances().bfloat16()).masked_fill(hidden(), -math.inf))

    gm, _ = captured(form, *operands(dtype=torch.bfloat16), SLOPES.bfloat16())
    assert (find_attention(gm), lift_masks(gm)) == (1, 0)


def test_slopes_of_single_precision_serve_half_precision() -> None:
    def form(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        scores = (q @ k.mT).float() + s[:, None, None] * distances().float()
        return scores.masked_fill(hidden(), -math.inf).softmax(-1).to(v.dtype) @ v

    gm, _ = captured(form, *operands(dtype=torch.bfloat16), SLOPES.float())
    assert (find_attention(gm), lift_masks(gm)) == (1, 1)
    (node,) = attention_nodes(gm)
    assert Call.of(node).tensor("slopes").dtype is torch.float32


class Sloping(TinyLM):
    """Attends with slopes; trained ones stay what they are."""

    def __init__(self, is_trained: bool) -> None:
        super().__init__()
        slopes = torch.rand(self.heads)
        self.slopes: Any = nn.Parameter(slopes) if is_trained else slopes.double()
        if not is_trained:
            del self.slopes
            self.register_buffer("slopes", slopes)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(x.shape[1])
        bias = self.slopes[:, None, None] * (at - at[:, None])
        bias = bias.masked_fill(at > at[:, None], -math.inf)
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("is_trained", [False, True])
def test_slopes_keep_numerics(world_size: int, is_trained: bool) -> None:
    found = verify(Sloping(is_trained), batch(11), world_size=world_size, dtype=torch.float64)
    found.raise_if_wrong()
    words = [describe(node) for node in attention_nodes(found.transformed.analysed)]
    assert words == ([] if is_trained else ["causal, ALiBi"])
