"""Attention by hand, in the words that people use for it: one operator and a recognised mask wherever that means the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.choose.attention_sites import attention_nodes
from cpcompile.passes import ANALYSIS
from cpcompile.passes.lift_masks import describe
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_attention_forms import Attending, hidden

B, H, S, D = 2, 2, 7, 4
LEAST = torch.finfo(torch.float64).min
LONGEST = 40
Form = Callable[[Tensor, Tensor, Tensor], Tensor]


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / 2


def masked(q: Tensor, k: Tensor, fill: float = -math.inf) -> Tensor:
    return scores_of(q, k).masked_fill(hidden(q), fill)


def tril(x: Tensor) -> Tensor:
    """Return ones and zeros for the queries `[B, H, S, D]`, of their dtype."""
    return torch.tril(torch.ones(x.shape[2], x.shape[2], dtype=x.dtype)).view(1, 1, x.shape[2], x.shape[2])


def without_first(x: Tensor) -> Tensor:
    """Return where a key comes after a query or is among the first two: two rows see none."""
    return hidden(x) | (torch.arange(x.shape[2]) < 2)


def normalised(e: Tensor) -> Tensor:
    return e / e.sum(-1, keepdim=True)


def openai(q: Tensor, k: Tensor, fill: float = -1e10) -> Tensor:
    return scores_of(q, k) * tril(q) + fill * (1 - tril(q))


def meta(q: Tensor, k: Tensor, v: Tensor, start: int = 0) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -math.inf)
    mask = torch.hstack([torch.zeros((q.shape[2], start)), torch.triu(mask, diagonal=1)]).type_as(q)
    return F.softmax((torch.matmul(q, k.transpose(2, 3)) / 2 + mask).float(), dim=-1).type_as(q) @ v


def alibi(heads: int, length: int, dtype: torch.dtype) -> Tensor:
    places = torch.arange(1 - length, 1, dtype=torch.int32).view(1, 1, 1, length)
    exponents = torch.arange(1, heads + 1).to(dtype) * 8 / heads
    return places * (1.0 / torch.pow(2, exponents)).view(1, heads, 1, 1)


def mpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with a table that is longer than the sequence, of which the last places are taken."""
    length, scores = q.shape[2], scores_of(q, k)
    table = torch.zeros(1, q.shape[1], 1, LONGEST, dtype=q.dtype) + alibi(q.shape[1], LONGEST, q.dtype)
    scores = scores + table[:, :, max(0, table.size(2) - length) :, max(0, table.size(3) - length) :]
    seen = q.new_ones(length, length).tril().to(torch.bool)
    later = seen.logical_not()[-scores.size(2) :, -scores.size(3) :]
    return scores.masked_fill(later.view(1, 1, length, length), LEAST).softmax(-1) @ v


def transformers_mpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k) + alibi(q.shape[1], q.shape[2], q.dtype)[:, :, -q.shape[2] :, -k.shape[2] :]
    return scores.masked_fill(hidden(q), LEAST).softmax(-1) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores.masked_fill_(tril(q).bool().logical_not(), LEAST)
    return scores.softmax(-1) @ v


def by_index(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[..., hidden(q)] = -math.inf
    return scores.softmax(-1) @ v


def window_over_fewer_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend to the last two of a few keys: late queries see none."""
    places = torch.arange(q.shape[2])
    seen = places[:, None] - places[:3] < 2
    return scores_of(q, k[:, :, :3]).masked_fill(~seen, -1e9).softmax(-1) @ v[:, :, :3]


def of_undefined(w: Tensor, v: Tensor) -> Tensor:
    return w.masked_fill(w.isnan(), 0) @ v


def shifted(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


def exponentials(q: Tensor, k: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.exp(scores - scores.max(-1, keepdim=True)[0].detach())


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    largest = (x := masked(q, k)).amax(-1, keepdim=True).clamp(min=0)
    e = (x - largest).exp()
    return e / (torch.exp(-largest) + e.sum(-1, keepdim=True)) @ v


def filled(scores: Tensor, q: Tensor) -> Tensor:
    return scores.masked_fill(hidden(q), -math.inf)


def sdpa_with_zeros(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend as `add_zero_attn` of `torch.nn.MultiheadAttention` says."""
    shape = [*q.shape[:2], q.shape[2] + 1, q.shape[3]]
    k, v = (torch.cat([x.flatten(0, 1), x.new_zeros(B * H, 1, D)], 1).view(shape) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else F.pad(mask, (0, 1)))


def merged_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (torch.arange(S) < 5).expand(B, S)
    mask = seen.view(B, 1, 1, S).expand(-1, H, -1, -1).reshape(B * H, 1, S)
    return F.scaled_dot_product_attention(q, k, v, mask.view(B, H, -1, S))


def beside_what_hides(q: Tensor, k: Tensor, v: Tensor, zeroes: bool = False) -> Tensor:
    """Attend with a bias of tokens that hides the first two keys: their queries see none, and attend to all."""
    bias = k.detach().sum(-1)[:, :, None].masked_fill(torch.arange(S) < 2, LEAST)
    weights = (scores_of(q, k) + bias).masked_fill(hidden(q), LEAST).softmax(-1)
    return (weights * tril(q) if zeroes else weights) @ v


FORMS: dict[str, tuple[str, Form]] = {
    # Softmax ignores what is taken from a whole row.
    "minus the largest": ("causal", lambda q, k, v: shifted(masked(q, k)).softmax(-1) @ v),
    "minus the largest, then masked": (
        "causal",
        lambda q, k, v: shifted(scores_of(q, k)).masked_fill(hidden(q), -math.inf).softmax(-1) @ v,
    ),
    "minus the largest, detached": (
        "causal",
        lambda q, k, v: (x := masked(q, k, LEAST)).sub(x.max(-1, True).values.detach()).softmax(-1) @ v,
    ),
    "minus the largest of all": ("causal", lambda q, k, v: (x := masked(q, k)).sub(x.max()).softmax(-1) @ v),
    "minus the largest, kept by unsqueeze": (
        "causal",
        lambda q, k, v: (x := masked(q, k)).sub(x.amax(-1)[..., None]).softmax(-1) @ v,
    ),
    # Exponentials over their sum.
    "exp": ("causal", lambda q, k, v: normalised(masked(q, k).exp()) @ v),
    "exp, shifted": ("causal", lambda q, k, v: normalised(shifted(masked(q, k)).exp()) @ v),
    "exp, divided late": ("causal", lambda q, k, v: (e := masked(q, k).exp()) @ v / e.sum(-1)[..., None]),
    "exp, masked": ("causal", lambda q, k, v: normalised(exponentials(q, k) * tril(q)) @ v),
    "exp, filled": ("causal", lambda q, k, v: normalised(exponentials(q, k).masked_fill(hidden(q), 0)) @ v),
    "exp of log_softmax": ("causal", lambda q, k, v: masked(q, k).log_softmax(-1).exp() @ v),
    "exp minus logsumexp": ("causal", lambda q, k, v: (x := masked(q, k)).sub(x.logsumexp(-1, True)).exp() @ v),
    # One more score, whose weight is dropped.
    "softmax off by one": ("causal, sinks", lambda q, k, v: (e := masked(q, k).exp()) / (1 + e.sum(-1, True)) @ v),
    "softmax off by one, shifted": ("causal, sinks", off_by_one),
    "softmax off by one, divided late": (
        "causal, sinks",
        lambda q, k, v: (e := masked(q, k).exp()) @ v / (e.sum(-1, keepdim=True) + 1e-3),
    ),
    "beside an exponential": (
        "causal, sinks",
        lambda q, k, v: (
            (e := masked(q, k).exp())
            / (e.sum(-1, True) + torch.linspace(0, 1, H, dtype=q.dtype).exp().view(1, H, 1, 1))
            @ v
        ),
    ),
    "a column of zeros": ("causal, sinks", lambda q, k, v: F.pad(masked(q, k), (0, 1)).softmax(-1)[..., :-1] @ v),
    "a column of numbers in front": (
        "causal, sinks",
        lambda q, k, v: torch.cat([q.new_full((B, H, S, 1), 0.3), masked(q, k)], -1).softmax(-1)[..., 1:] @ v,
    ),
    "a key of zeros": ("sinks", lambda q, k, v: sdpa_with_zeros(q, k, v, None)),
    "a key of zeros, causal": (
        "causal, sinks",
        lambda q, k, v: sdpa_with_zeros(q, k, v, hidden(q).to(q.dtype).masked_fill(hidden(q), -math.inf)),
    ),
    # A factor that is the same along keys or along queries.
    "a factor of rows": ("causal", lambda q, k, v: filled(q @ k.mT * q.sum(-1, True).exp(), q).softmax(-1) @ v),
    "a factor of columns": ("causal", lambda q, k, v: filled(k.sum(-1)[:, :, None] * (q @ k.mT), q).softmax(-1) @ v),
    "a divisor of heads": (
        "causal",
        lambda q, k, v: filled(q @ k.mT / v.std((0, 2, 3))[:, None, None], q).softmax(-1) @ v,
    ),
    # A mask for which batch and heads were merged and split again.
    "merged heads": ("key padding", merged_heads),
    # Numbers that hide, where each row keeps a key.
    "scores * m - 1e10 * (1 - m)": (
        "causal",
        lambda q, k, v: (scores_of(q, k) * tril(q) - 1e10 * (1 - tril(q))).softmax(-1) @ v,
    ),
    "scores * m + -1e9 * (1 - m)": ("causal", lambda q, k, v: openai(q, k, -1e9).softmax(-1) @ v),
    "scores - 1e10 * (1 - m)": ("causal", lambda q, k, v: (scores_of(q, k) - 1e10 * (1 - tril(q))).softmax(-1) @ v),
    "where tril, -inf": (
        "causal",
        lambda q, k, v: torch.where(tril(q) == 1, scores_of(q, k), -math.inf).softmax(-1) @ v,
    ),
    "where tril, -1e9": ("causal", lambda q, k, v: torch.where(tril(q) == 1, scores_of(q, k), -1e9).softmax(-1) @ v),
    "where not tril": ("causal", lambda q, k, v: torch.where(tril(q) == 0, -1e9, scores_of(q, k)).softmax(-1) @ v),
    "where, full_like": (
        "causal",
        lambda q, k, v: (
            torch.where(tril(q).bool(), x := scores_of(q, k), torch.full_like(x, -math.inf)).softmax(-1) @ v
        ),
    ),
    "log of tril": ("causal", lambda q, k, v: (scores_of(q, k) + tril(q).log()).softmax(-1) @ v),
    "added, of the type of the scores": (
        "causal",
        lambda q, k, v: (
            ((x := scores_of(q, k)) + torch.zeros_like(x).type_as(v).masked_fill(hidden(q), -math.inf)).softmax(-1) @ v
        ),
    ),
    "in place": ("causal", in_place),
    "by index": ("causal", by_index),
    "masked, then scaled": ("causal", lambda q, k, v: ((q @ k.mT).masked_fill(hidden(q), LEAST) * 0.5).softmax(-1) @ v),
    "filled by two numbers": (
        "causal",
        lambda q, k, v: masked(q, k, -1e9).masked_fill(hidden(q).triu(3), LEAST).softmax(-1) @ v,
    ),
    # Weights that are set to 0 after the softmax.
    "nan_to_num": ("causal", lambda q, k, v: torch.nan_to_num(masked(q, k).softmax(-1)) @ v),
    "nan_to_num of empty rows": (
        "causal, key padding",
        lambda q, k, v: torch.nan_to_num(scores_of(q, k).masked_fill(without_first(q), -math.inf).softmax(-1)) @ v,
    ),
    "isnan of empty rows": (
        "causal, key padding",
        lambda q, k, v: of_undefined(scores_of(q, k).masked_fill(without_first(q), -math.inf).softmax(-1), v),
    ),
    "zeroed": ("causal", lambda q, k, v: (masked(q, k, LEAST).softmax(-1) * tril(q)) @ v),
    "zeroed, of empty rows": (
        "causal, key padding",
        lambda q, k, v: (
            scores_of(q, k).masked_fill(without_first(q), -1e9).softmax(-1).masked_fill(without_first(q), 0) @ v
        ),
    ),
    "added, and zeroed, of empty rows": (
        "causal, key padding",
        lambda q, k, v: (scores_of(q, k) - 1e10 * without_first(q)).softmax(-1).masked_fill(without_first(q), 0) @ v,
    ),
    "empty rows attend to all": (
        "dense",
        lambda q, k, v: scores_of(q, k).masked_fill(without_first(q), -1e9).softmax(-1) @ v,
    ),
    "a window over fewer keys": ("dense", window_over_fewer_keys),
    # As in models.
    "Meta's Llama": ("causal", meta),
    "MPT": ("causal, ALiBi", mpt),
    "MPT in transformers": ("causal, ALiBi", transformers_mpt),
}


def operands() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, H, S, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def analysed(form: Callable[..., Any]) -> fx.GraphModule:
    """Return the graph of a form, after the passes that say what its attentions are."""
    gm: fx.GraphModule = make_fx(lambda q, k, v: form(q, k, v), tracing_mode="fake", pre_dispatch=True)(*operands())
    for analysis in ANALYSIS:
        analysis(gm)
        gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def words(gm: fx.GraphModule) -> list[str]:
    return [describe(node).split(" [")[0] for node in attention_nodes(gm)]


def assert_same(gm: fx.GraphModule, form: Callable[..., Any], atol: float = 1e-12) -> None:
    """Check values and gradients of a graph against those of what it was traced from."""
    inputs = operands()
    outs = [out if isinstance(out, Tensor) else out[0] for out in (gm(*inputs), form(*inputs))]
    torch.testing.assert_close(*outs, rtol=0, atol=atol)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), inputs) for x in outs), rtol=0, atol=100 * atol)


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_one_operator(name: str) -> None:
    expected, form = FORMS[name]
    gm = analysed(form)
    assert words(gm) == [expected]
    assert not [
        node for node in gm.graph.nodes if "softmax" in str(node.target) or node.target is torch.ops.aten.matmul.default
    ]
    assert_same(gm, form, 1e-6 if name == "Meta's Llama" else 1e-12)
    text = str(gm.graph)
    assert ([analysis(gm) for analysis in ANALYSIS], str(gm.graph)) == ([0] * len(ANALYSIS), text)


def chunked_product(q: Tensor, v: Tensor) -> Tensor:
    """Return a product that depends on its operands through an operator with several results only."""
    first, second = torch.cat([q, v], -1).chunk(2, -1)
    return first @ second.mT


def two_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = masked(q, k).softmax(-1)
    return weights @ v + weights @ k


def regularised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = masked(q, k).softmax(-1)
    return weights @ v + weights.square().sum(-1, keepdim=True)


OTHERS: dict[str, Form] = {
    "minus the largest of another row": lambda q, k, v: (
        (x := masked(q, k, LEAST)).sub(x.amax(-2, True)).softmax(-1) @ v
    ),
    "minus the largest of others": lambda q, k, v: masked(q, k).sub((v @ v.mT).amax(-1, True)).softmax(-1) @ v,
    "minus a column": lambda q, k, v: (x := masked(q, k, LEAST)).sub(x[..., :1]).softmax(-1) @ v,
    "capped after it": lambda q, k, v: shifted(scores_of(q, k)).tanh().softmax(-1) @ v,
    "exp over less than their sum": lambda q, k, v: (e := masked(q, k).exp()).div(e.sum(-1, True) - 1e-3) @ v,
    "exp over their sum and one for each query": lambda q, k, v: (
        (e := masked(q, k).exp()).div(e.sum(-1, True) + q.sum(-1, True).exp()) @ v
    ),
    "a key of ones": lambda q, k, v: torch.cat([scores_of(q, k), q.sum(-1, True)], -1).softmax(-1)[..., :-1] @ v,
    "a factor of pairs": lambda q, k, v: filled(q @ k.mT * tril(q).cumsum(-1), q).softmax(-1) @ v,
    "a factor behind a mask": lambda q, k, v: masked(q, k, -1e9).mul(q.sum(-1, True)).softmax(-1) @ v,
    "a fill beside a bias that hides": beside_what_hides,
    "zeroed, beside a bias that hides": lambda q, k, v: beside_what_hides(q, k, v, zeroes=True),
    "exp over the sum of queries": lambda q, k, v: (e := scores_of(q, k).exp()).div(e.sum(-2, True)) @ v,
    "exp over the sum of others": lambda q, k, v: scores_of(q, k).exp().div(scores_of(k, q).exp().sum(-1, True)) @ v,
    "exp times a number": lambda q, k, v: normalised(scores_of(q, k).exp() * (2 * tril(q))) @ v,
    "exp minus the logsumexp of queries": lambda q, k, v: (x := scores_of(q, k)).sub(x.logsumexp(-2, True)).exp() @ v,
    "a number that does not hide": lambda q, k, v: torch.where(tril(q) == 1, scores_of(q, k), -1e4).softmax(-1) @ v,
    "zeros in place of scores": lambda q, k, v: (scores_of(q, k) * tril(q)).softmax(-1) @ v,
    "zeros and what is added elsewhere": lambda q, k, v: (
        (scores_of(q, k) * tril(q) - 1e10 * (1 - tril(q).mT)).softmax(-1) @ v
    ),
    "zeroed elsewhere": lambda q, k, v: masked(q, k).softmax(-1).masked_fill(hidden(q).mT, 0) @ v,
    "zeroed in part, of empty rows": lambda q, k, v: (
        scores_of(q, k).masked_fill(without_first(q), -1e9).softmax(-1).masked_fill(hidden(q), 0) @ v
    ),
    "undefined is one": lambda q, k, v: torch.nan_to_num(masked(q, k).softmax(-1), nan=1.0) @ v,
    "filled with numbers of empty rows, and added": lambda q, k, v: (
        scores_of(q, k).masked_fill(without_first(q), -1e9).add(torch.arange(q.shape[2]) / 7).softmax(-1) @ v
    ),
    "filled with ones": lambda q, k, v: masked(q, k).softmax(-1).masked_fill(hidden(q), 1) @ v,
    "a trained bias of chunks": lambda q, k, v: (masked(q, k) + chunked_product(q, v)).softmax(-1) @ v,
    "a trained bias of a type": lambda q, k, v: (masked(q, k) + (v @ v.mT).type_as(q)).softmax(-1) @ v,
    "two products": two_products,
    "weights with a gradient": regularised,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_means_another_thing_stays_as_it_is(name: str) -> None:
    gm = analysed(OTHERS[name])
    assert words(gm) == []
    assert_same(gm, OTHERS[name])


def returning_detached(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = masked(q, k).softmax(-1)
    return weights @ v, weights.detach()


def returning_a_statistic(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = masked(q, k).softmax(-1)
    out = weights @ v
    with torch.no_grad():
        largest = weights.amax(-1).mean(1)
    return out, largest


@pytest.mark.parametrize("form", [returning_detached, returning_a_statistic])
def test_weights_without_a_gradient_are_computed_beside_the_attention(form: Callable[..., Any]) -> None:
    gm = analysed(form)
    assert words(gm) == ["causal"]
    assert_same(gm, form)
    torch.testing.assert_close(gm(*operands())[1], form(*operands())[1])


def test_weights_that_are_returned_are_computed_once() -> None:
    assert words(analysed(lambda q, k, v: (w := masked(q, k).softmax(-1), w @ v))) == []


def test_dropped_weights_that_are_returned_are_dropped_once() -> None:
    assert words(analysed(lambda q, k, v: (w := F.dropout(masked(q, k).softmax(-1), 0.5), w @ v))) == []
    assert words(analysed(lambda q, k, v: ((w := F.dropout(masked(q, k).softmax(-1), 0.5)).detach(), w @ v))) == []
    assert words(analysed(lambda q, k, v: F.dropout(masked(q, k).softmax(-1), 0.5) @ v)) == ["causal"]


class Empty(Attending):
    """Rows that see no key attend to all, or to none."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.form(q, k, v)


RANKS = [
    ("exp, masked", 2),
    ("scores * m - 1e10 * (1 - m)", 4),
    ("nan_to_num of empty rows", 3),
    ("softmax off by one", 3),
    ("a key of zeros, causal", 2),
    ("a factor of rows", 4),
    ("empty rows attend to all", 3),
    ("MPT", 3),
    ("MPT in transformers", 2),
    ("Meta's Llama", 1),
]


@pytest.mark.parametrize(("name", "world_size"), RANKS)
def test_forms_are_exact_on_ranks(name: str, world_size: int) -> None:
    expected, form = FORMS[name]
    found = verify(Empty(form), batch(11), world_size=world_size, dtype=torch.float64)
    found.raise_if_wrong()
    assert words(found.transformed.analysed) == [expected]


class Watched(TinyLM):
    """Returns, beside its loss, how much each token is looked at."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        x = self.embedding(input_ids)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = masked(q, k).softmax(-1)
        x = x + (weights @ v).transpose(1, 2).flatten(-2)
        return self.loss(self.head(x), labels), weights.detach().mean(1)


def test_watched_weights_are_exact_on_ranks() -> None:
    found = verify(Watched(), batch(11), world_size=2, dtype=torch.float64)
    found.raise_if_wrong()
    assert words(found.transformed.analysed) == ["causal"]
