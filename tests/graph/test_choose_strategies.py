"""Attentions are marked with their strategies."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.choose.attention_sites import attention_nodes, rewritten_attentions
from cpcompile.ir.annotation import annotation
from cpcompile.ir.operator_call import Call
from cpcompile.passes import choose_strategies
from tests.graph.small_models import TinyLM, batch, planned


class Biased(TinyLM):
    """Adds a bias to the scores, which no merge of blocks keeps exact where it hides a whole row."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        bias = torch.linspace(0, 1, q.shape[2], dtype=x.dtype).outer(torch.ones(q.shape[2], dtype=x.dtype))
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(-2)


def test_marks_every_attention_in_order() -> None:
    gm = planned(TinyLM(), batch()).analysed
    assert choose_strategies(gm, strategies=["ring"]) == 1
    assert [annotation(node).strategy for node in attention_nodes(gm)] == ["ring"]


def test_leaves_the_graph_alone_and_may_run_again() -> None:
    gm = planned(TinyLM(), batch()).analysed
    text = gm.graph.python_code("self").src
    assert choose_strategies(gm, strategies=["gather"]) == choose_strategies(gm, strategies=["gather"]) == 1
    assert gm.graph.python_code("self").src == text


def test_no_attention_no_mark() -> None:
    gm = planned(TinyLM(), batch()).analysed
    (node,) = attention_nodes(gm)
    node.replace_all_uses_with(node.args[0])
    gm.graph.erase_node(node)
    assert choose_strategies(gm, strategies=[]) == 0


def test_ring_gives_way_where_it_would_not_be_exact() -> None:
    with pytest.warns(UserWarning, match=r"1 attention\(s\) use gather in place of ring.*(\n.*)*scaled_dot_product"):
        transformed = planned(Biased(), batch(), strategy="ring")
    assert transformed.choice.strategies == ("gather",)


@pytest.mark.parametrize("strategy", ["ulysses", "gather"])
def test_keeps_numerics(strategy: str) -> None:
    result = verify(Biased(), batch(7), world_size=3, dtype=torch.float64, strategy=strategy)
    assert result.ok, result


class LearnedBias(Biased):
    """Learns its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(1, 1, 8, 8))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, self.bias).transpose(1, 2).flatten(-2)


def test_a_bias_that_learns_is_exact() -> None:
    """It is no mask, which takes no gradient: such an attention is written out."""
    transformed = planned(LearnedBias(), batch())
    assert transformed.choice.strategies == ()
    verify(LearnedBias(), batch(), world_size=2, dtype=torch.float64).raise_if_wrong()


def test_pairs_are_in_order() -> None:
    """Two attentions, two strategies: the first mark is of the first attention."""

    class Two(TinyLM):
        def logits(self, input_ids: Tensor) -> Tensor:
            x = self.embedding(input_ids)
            x = x + self.attend(x)
            return self.head(x + self.attend(x))

    gm = planned(Two(), batch()).analysed
    assert choose_strategies(gm, strategies=["ring", "ulysses"]) == 2
    marks = [annotation(node).strategy for node in attention_nodes(gm)]
    assert marks == ["ring", "ulysses"]
    order = list(gm.graph.nodes)
    assert all(order.index(a) < order.index(b) for a, b in pairwise(attention_nodes(gm)))


class Windowed(TinyLM):
    """Each token sees itself and two before."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        at = torch.arange(q.shape[2])
        seen = (at <= at[:, None]) & (at > at[:, None] - 3)
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(-2)


def test_only_a_window_has_halos() -> None:
    transformed = planned(Windowed(), batch(), strategy="halo")
    assert transformed.choice.strategies == ("halo",)
    assert "halo_attention" in str(transformed.graph.graph)
    with pytest.warns(
        UserWarning, match=r"1 attention\(s\) use gather in place of halo: it has no window that bounds both"
    ):
        assert planned(TinyLM(), batch(), strategy="halo").choice.strategies == ("gather",)


@pytest.mark.parametrize("length", [8, 13])
@pytest.mark.parametrize("balancer", ["contiguous", "zig_zag"])
@pytest.mark.parametrize(("model", "strategy"), [(Windowed, "halo"), (Windowed, "usp"), (TinyLM, "usp")])
def test_halo_and_usp_keep_numerics(model: type[TinyLM], strategy: str, balancer: str, length: int) -> None:
    inner_size = 2 if strategy == "usp" else 0
    options = {"strategy": strategy, "balancer": balancer}
    result = verify(model(), batch(length), world_size=4, inner_size=inner_size, dtype=torch.float64, **options)
    assert result.ok, result


def test_the_kernel_and_the_heads_of_a_message_reach_the_operator() -> None:
    graph = planned(Windowed(), batch(), strategy="halo", kernel="math", heads_per_message=1).graph
    (node,) = rewritten_attentions(graph)
    assert node.target is torch.ops.cpcompile.halo_attention.default
    assert (Call.of(node)["kernel_name"], Call.of(node)["heads_per_message"]) == ("math", 1)
    # As it is defined, whatever kernel was asked for.
    assert verify(TinyLM(), batch(), world_size=2, kernel="cudnn").ok
