"""A sharded attention becomes the collective of its strategy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.errors import ConfigError
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import Sharded
from cpcompile.passes import place_tokens, rewrite_attention
from cpcompile.passes.rewrite_attention import OPERATORS
from cpcompile.runtime.attention.catalogue import STRATEGIES
from tests.graph.small_models import TinyLM, batch, before, count, planned

cp = torch.ops.cpcompile


# Latents are in test_gather_latents.py.
@pytest.mark.parametrize("strategy", [name for name, known in STRATEGIES.items() if not known.is_latent])
def test_rewrites_each_attention_to_its_strategy(strategy: str) -> None:
    transformed = planned(TinyLM(), batch())
    gm = before(transformed, place_tokens)
    (node,) = gm.graph.find_nodes(op="call_function", target=cp.attention.default)
    annotate(node, strategy=strategy)
    if strategy == "halo":
        node.args, node.kwargs = Call.of(node).rebound({"window": 3})
    plan = replace(transformed.plan, inner_size=2) if strategy == "usp" else transformed.plan
    assert rewrite_attention(gm, plan=plan) == 1
    (collective,) = gm.graph.find_nodes(op="call_function", target=OPERATORS[strategy])
    (out,) = collective.users
    assert placement_of(out) == Sharded(2)
    assert annotation(out).origin
    assert count(gm, cp.attention.default) == 0
    names = {argument.name for argument in OPERATORS[strategy]._schema.arguments if argument.kwarg_only}
    assert set(collective.kwargs) == names - {"layer"}  # profiles are told of it when the graph is compiled
    assert [collective.kwargs[name] for name in ("length", "layout", "world_size", "group")] == [
        8,
        transformed.plan.layout,
        2,
        "",
    ]


class Biased(TinyLM):
    """Adds a bias that is no predicate to the scores."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        places = torch.arange(x.shape[1])
        bias = (places - places[:, None]).to(x.dtype).sin()
        return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(-2)


REFUSED = {
    "ring": (Biased, {}, "its additive mask may hide every key of a row"),
    "usp": (Biased, {"world_size": 4, "inner_size": 2}, "its additive mask may hide every key of a row"),
    "halo": (TinyLM, {}, "it has no window that bounds both sides"),
    "usp alone": (TinyLM, {}, "the ranks are no grid of two axes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_strategy_that_is_not_exact(name: str) -> None:
    model, changes, reason = REFUSED[name]
    transformed = planned(model(), batch())
    gm = before(transformed)
    (node,) = gm.graph.find_nodes(op="call_function", target=cp.attention.default)
    strategy = name.split()[0]
    annotate(node, strategy=strategy)
    place_tokens(gm, plan=transformed.plan)
    with pytest.raises(ConfigError, match=f"strategy='{strategy}' cannot compute this attention: {reason}") as error:
        rewrite_attention(gm, plan=replace(transformed.plan, **changes))
    assert "F.scaled_dot_product_attention" in str(error.value)
    assert "or leave the choice to strategy='auto'" in str(error.value)


class WholeAttention(TinyLM):
    """Attends over a table of parameters, which every rank holds whole."""

    def logits(self, input_ids: Tensor) -> Tensor:
        table = self.attend(self.embedding.weight[None])
        return self.head(self.embedding(input_ids) + table.sum(1, keepdim=True))


def test_leaves_attention_over_whole_tensors_alone() -> None:
    transformed = planned(WholeAttention(), batch())
    gm = before(transformed, place_tokens)
    text = gm.graph.python_code("self").src
    assert rewrite_attention(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text
    assert count(gm, cp.attention.default) == 1


@pytest.mark.parametrize("strategy", ["gather", "ring", "ulysses"])
@pytest.mark.parametrize(("length", "world_size"), [(8, 2), (7, 4)])
def test_keeps_numerics(strategy: str, length: int, world_size: int) -> None:
    result = verify(TinyLM(), batch(length), world_size=world_size, dtype=torch.float64, strategy=strategy)
    assert result.ok, result


def test_whole_attention_keeps_numerics() -> None:
    result = verify(WholeAttention(), batch(), world_size=3, dtype=torch.float64)
    assert result.ok, result


def test_second_run_changes_nothing() -> None:
    transformed = planned(TinyLM(), batch())
    gm = before(transformed, place_tokens, rewrite_attention)
    text = gm.graph.python_code("self").src
    assert rewrite_attention(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


class Packed(TinyLM):
    """Attends twice within documents, each time by a mask that it makes anew; `names` are the ids that the masks compare."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, input_ids: Tensor, labels: Tensor, **ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        for name in self.names:
            starts = torch.diff(ids[name], prepend=ids[name][:, :1] - 1) != 1
            documents = starts.cumsum(-1)
            visible = (documents[:, :, None] == documents[:, None])[:, None]
            visible = visible & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, visible).transpose(1, 2).flatten(-2)
        return self.loss(self.head(x), labels)


def packed_batch(length: int = 11) -> dict[str, Tensor]:
    places = torch.arange(length)
    ids = {"a": torch.stack([places % 4, places % 5]), "b": torch.stack([places % 3, places])}
    return batch(length) | ids


@pytest.mark.parametrize("names", ["aa", "ab"])
def test_the_host_learns_once_where_documents_begin(names: str) -> None:
    transformed = planned(Packed(*names), packed_batch(), token_dims=dict.fromkeys(("input_ids", "labels"), 1))
    bounds = transformed.graph.graph.find_nodes(op="call_function", target=cp.document_bounds.default)
    assert len(bounds) == len(set(names))
    attentions = [n for n in transformed.graph.graph.nodes if n.target in OPERATORS.values()]
    taken = [Call.of(node)["bounds"] for node in attentions]
    assert taken == (bounds if names == "ab" else bounds * 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_documents_keep_numerics(world_size: int) -> None:
    inputs = packed_batch()
    result = verify(Packed("a", "b", "a"), inputs, world_size=world_size, dtype=torch.float64)
    assert result.ok, result


class Alternating(Packed):
    """Attends by two masks in turn, each made anew of the same ids, as layers with a window and layers without do."""

    def forward(self, input_ids: Tensor, labels: Tensor, **ids: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding(input_ids)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        made = [(torch.diff(ids["a"], prepend=ids["a"][:, :1] - 1) != 1).cumsum(-1) for _ in range(2)]
        masks = [(documents[:, :, None] == documents[:, None])[:, None] & causal for documents in made]
        for mask in (masks[0], masks[1], masks[0]):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2)
        return self.loss(self.head(x), labels)


def test_masks_in_turn_share_what_the_host_learns() -> None:
    verify(Alternating(), packed_batch(), world_size=2, dtype=torch.float64).raise_if_wrong()
