"""Rows that see no key: what one device computes there, and back-propagates, in every spelling of a mask and every strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import cpcompile
from cpcompile.inspect.verify import Verification
from cpcompile.ir.annotation import annotate
from cpcompile.passes import cut_hidden_rows
from tests.graph.small_models import TinyLM, batch, planned

LENGTH = 9
Spelling = Callable[[Tensor, Tensor, Tensor, float], Tensor]

# Scores, where they are hidden, a bias, and the number that hides.
SPELLINGS: dict[str, Spelling] = {
    "fill": lambda s, hidden, bias, least: s.masked_fill(hidden, least),
    "fill after a bias": lambda s, hidden, bias, least: (s + bias).masked_fill(hidden, least),
    "fill before a bias": lambda s, hidden, bias, least: s.masked_fill(hidden, least) + bias,
    "choose": lambda s, hidden, bias, least: torch.where(hidden, least, s),
    "choose after a bias": lambda s, hidden, bias, least: torch.where(~hidden, s + bias, least),
    "add": lambda s, hidden, bias, least: s + torch.zeros_like(s[:1, :1]).masked_fill(hidden, least),
    "add after a bias": lambda s, hidden, bias, least: s + bias + hidden.to(s) * least,
    "fill a bias": lambda s, hidden, bias, least: s + bias.expand_as(s).masked_fill(hidden, least),
    "fill what comes later, add the padding": lambda s, hidden, bias, least: (
        s.masked_fill(later(s), least) + (hidden & ~later(s)).to(s) * least
    ),
    "fill what comes later, add the padding to all of it": lambda s, hidden, bias, least: (
        s.masked_fill(later(s), least) + hidden.all(-2, keepdim=True).to(s) * least
    ),
}
LEAST = {"float64": torch.finfo(torch.float64).min, "float32": torch.finfo(torch.float32).min, "1e9": -1e9, "1e4": -1e4}


def later(s: Tensor) -> Tensor:
    index = torch.arange(s.shape[-1])
    return index > index[:, None]


class Padded(TinyLM):
    """A language model whose first tokens are padding: their rows see no key."""

    def __init__(self, spelling: Spelling, least: float) -> None:
        super().__init__()
        self.spelling, self.least = spelling, least

    def attend(self, x: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) * 0.5
        index = torch.arange(x.shape[1])
        bias = torch.tensor([0.5, 0.25], dtype=x.dtype)[:, None, None] * (index - index[:, None])
        scores = self.spelling(scores, later(scores) | ~real[:, None, None], bias, self.least)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def forward(self, input_ids: Tensor, labels: Tensor, real: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        return self.loss(self.head(x + self.attend(x, real.bool())), labels)


def compared(model: nn.Module, strategy: str = "auto", world_size: int = 3) -> Verification:
    """Compare a model on a batch with padding on the left: 4 tokens of one row, none of the other."""
    real = (torch.arange(LENGTH) >= torch.tensor([[4], [0]])).long()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*in place of")
        return cpcompile.verify(
            model,
            {**batch(LENGTH), "real": real},
            world_size=world_size,
            dtype=torch.float64,
            tolerance=1e-12,
            strategy=strategy,
            token_dims={"input_ids": 1},
        )


@pytest.mark.parametrize("least", LEAST)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(spelling: str, least: str) -> None:
    compared(Padded(SPELLINGS[spelling], LEAST[least])).raise_if_wrong()


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "gather", "halo", "latent"])
@pytest.mark.parametrize("spelling", ["fill after a bias", "add after a bias"])
def test_every_strategy(spelling: str, strategy: str) -> None:
    compared(Padded(SPELLINGS[spelling], LEAST["float64"]), strategy).raise_if_wrong()


class Fused(Padded):
    """The same by one operator, whose mask is added."""

    def attend(self, x: Tensor, real: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        hidden = later(q @ k.transpose(-1, -2)) | ~real[:, None, None]
        mask = torch.zeros(hidden.shape, dtype=x.dtype).masked_fill(hidden, self.least)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def test_a_mask_that_one_operator_adds() -> None:
    with sdpa_kernel(SDPBackend.MATH):  # the kernel for CPUs has other gradients for such rows (docs/attention.md)
        compared(Fused(SPELLINGS["add"], LEAST["float64"])).raise_if_wrong()


def test_it_fires_where_a_fill_leaves_a_dense_mask() -> None:
    assert compared(Padded(SPELLINGS["fill"], LEAST["float32"])).transformed.changes["cut_hidden_rows"] == 1
    assert compared(Padded(SPELLINGS["add"], LEAST["float32"])).transformed.changes["cut_hidden_rows"] == 0


def test_it_leaves_others_alone_and_is_done_once() -> None:
    found = planned(TinyLM(), batch())
    text = str(found.analysed.graph)
    (node,) = found.analysed.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    annotate(node, fill=-1e9)  # its mask was lifted
    assert cut_hidden_rows(found.analysed) == 0
    assert str(found.analysed.graph) == text
    cut = compared(Padded(SPELLINGS["fill"], LEAST["float32"])).transformed.analysed
    assert cut_hidden_rows(cut) == 0
