"""Layouts that follow documents: what is hoisted, shared and refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpcompile
from cpcompile.compile.transform import shard_graph
from cpcompile.errors import ConfigError, NoRule
from cpcompile.inspect import first_difference
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.definitions.attention import attention
from tests.packing import PackedLM, packed_batch

cp = torch.ops.cpcompile


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def graph_of(model: nn.Module, balancer: str, **inputs: Tensor) -> Any:
    from cpcompile.inspect.planned_step import plan_for
    from cpcompile.options.config import Config

    given = inputs or packed_batch("off_edges", 1)
    config = Config(balancer=balancer, strategy="ring", dynamic=False)
    return plan_for(model, given, world_size=2, config=config).graph


def test_bounds_are_found_once_and_before_tokens_are_sharded() -> None:
    nodes = list(graph_of(PackedLM(), "balanced").graph.nodes)
    (bounds,) = [node for node in nodes if node.target is cp.document_bounds.default]
    shards = [node for node in nodes if node.target is cp.shard_tokens.default]
    attentions = [node for node in nodes if node.target is cp.ring_attention.default]
    assert shards and attentions and all(bounds in node.all_input_nodes for node in shards + attentions)


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
def test_other_layouts_do_not_depend_on_documents(layout: str) -> None:
    for node in graph_of(PackedLM(), layout).graph.nodes:
        is_of_tokens = node.target in (cp.shard_tokens.default, cp.gather_tokens.default, cp.move_tokens.default)
        assert not (is_of_tokens and any(x.target is cp.document_bounds.default for x in node.all_input_nodes))


def test_without_documents_the_sequence_is_one() -> None:
    found = cpcompile.verify(
        small("NanoGPT"), small_batch(), world_size=3, balancer="balanced", strategy="ring", dtype=torch.float64
    )
    found.raise_if_wrong()
    assert not found.transformed.graph.graph.find_nodes(op="call_function", target=cp.document_bounds.default)


def test_the_first_difference_is_found_in_tokens_that_follow_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """All values before it are joined in the order of the documents, which is found once."""

    def broken(calls: list[Any]) -> list[Any]:
        return [(out + 1, *others) for out, *others in attention(calls)]

    found: list[Any] = []

    def counted(*args: Any) -> Any:
        found.append(orders_of(*args))
        return found[-1]

    orders_of = first_difference.orders_of
    monkeypatch.setitem(COLLECTIVES, cp.ring_attention.default, broken)
    monkeypatch.setattr(first_difference, "orders_of", counted)
    options = {"balancer": "balanced", "strategy": "ring", "dtype": torch.float64}
    result = cpcompile.verify(PackedLM(), packed_batch("off_edges", 2), world_size=3, **options)
    assert result.first_difference is not None
    assert result.first_difference.node == "scaled_dot_product_attention"
    assert "y = F.scaled_dot_product_attention(" in result.first_difference.place
    assert len(found) == 1
    assert found[0][0].documents is not None


def small(name: str) -> nn.Module:
    import tests.models

    torch.manual_seed(0)
    return getattr(tests.models, name)()


def small_batch() -> dict[str, Tensor]:
    return {"idx": torch.randint(61, (2, 29)), "targets": torch.randint(61, (2, 29))}


class Convolving(PackedLM):
    """A convolution along the tokens in front."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(61, 61, 4, padding=3, groups=61)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        result = super().forward(input_ids, labels, position_ids)
        logits = self.convolution(result["logits"].transpose(1, 2))[..., : input_ids.shape[1]]
        return {"loss": result["loss"] + logits.pow(2).mean()}


def test_a_convolution_has_its_tokens_in_chunks() -> None:
    options = {"balancer": "balanced", "strategy": "ring", "dtype": torch.float64}
    found = cpcompile.verify(Convolving(), packed_batch("off_edges", 2), world_size=3, **options)
    found.raise_if_wrong()
    (moved,) = found.transformed.graph.graph.find_nodes(op="call_function", target=cp.rearrange_tokens.default)
    (bounds,) = found.transformed.graph.graph.find_nodes(op="call_function", target=cp.document_bounds.default)
    assert bounds in moved.all_input_nodes


def test_auto_follows_no_documents_where_chunks_are_needed() -> None:
    plan = cpcompile.explain(Convolving(), packed_batch("off_edges", 1), world_size=2)
    assert "rearrange_tokens" not in plan.after


class Scanning(PackedLM):
    """A scan and a transform along the tokens behind, which need no chunks."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        result = super().forward(input_ids, labels, position_ids)
        logits = result["logits"].cumsum(1).tanh() * torch.fft.fft(result["logits"], dim=1).real
        return {"loss": result["loss"] + logits.mean()}


def test_scans_and_transforms_follow_documents_by_channels() -> None:
    options = {"balancer": "balanced", "strategy": "ring", "dtype": torch.float64, "tolerance": 1e-12}
    found = cpcompile.verify(Scanning(), packed_batch("off_edges", 2), world_size=3, **options)
    found.raise_if_wrong()
    exchanges = found.transformed.graph.graph.find_nodes(op="call_function", target=cp.exchange_dims.default)
    (bounds,) = found.transformed.graph.graph.find_nodes(op="call_function", target=cp.document_bounds.default)
    assert exchanges and all(bounds in node.all_input_nodes for node in exchanges)


class TwoKinds(PackedLM):
    """A second attention that sees other documents."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        result = super().forward(input_ids, labels, position_ids)
        halves = torch.arange(input_ids.shape[1], device=input_ids.device) // 8
        x = result["logits"][:, None]
        y = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=halves[:, None] == halves)
        return {"loss": result["loss"] + y.pow(2).mean()}


def test_two_kinds_of_documents_are_refused_with_the_line() -> None:
    with pytest.raises(ConfigError, match=r"(?s)not those of the attentions before it.*scaled_dot_product_attention"):
        cpcompile.explain(TwoKinds(), packed_batch("off_edges", 1), world_size=2, balancer="balanced")


class Routed(PackedLM):
    """Documents that hidden states decide."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        documents = (self.head(self.embed(input_ids)).sum(-1) > 0).cumsum(1)
        x = self.embed(input_ids)[:, None]
        index = torch.arange(x.shape[2], device=x.device)
        mask = (documents[:, None, :, None] == documents[:, None, None, :]) & (index[:, None] >= index)
        return {"loss": nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask).pow(2).mean()}


def test_documents_of_hidden_states_are_refused_with_the_line() -> None:
    with pytest.raises(ConfigError, match=r"(?s)computed from hidden states.*scaled_dot_product_attention"):
        cpcompile.explain(Routed(), packed_batch("off_edges", 1), world_size=2, balancer="balanced")


@pytest.mark.parametrize("kind", [Convolving, TwoKinds, Routed])
def test_auto_takes_a_layout_that_depends_on_nothing(kind: type[PackedLM]) -> None:
    with torch.device("meta"):
        model = kind()
        inputs = {name: torch.zeros(1, 1 << 16, dtype=torch.long) for name in ("input_ids", "labels", "position_ids")}
    assert cpcompile.explain(model, inputs, world_size=8).layout in ("contiguous", "zig_zag")


class PositionsOfSeveralKinds(PackedLM):
    """Positions come in several kinds (M-RoPE). Documents and rotary angles are computed from the first."""

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        return super().forward(input_ids, labels, position_ids[None].expand(3, -1, -1)[0])


def test_what_documents_are_computed_from_is_read_by_tokens_too() -> None:
    cpcompile.verify(
        PositionsOfSeveralKinds(), packed_batch("off_edges", 1), world_size=3, balancer="balanced", strategy="ring"
    ).raise_if_wrong()


@pytest.mark.parametrize("balancer", ["auto", "balanced"])
def test_auto_takes_a_layout_without_documents_where_one_with_them_is_refused(
    balancer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(gm: Any, choice: Any, plan: Any, *rest: Any) -> None:
        tried.append(plan.layout)
        if plan.layout == "balanced":
            raise NoRule("tokens outside the sequence are read")
        shard_graph(gm, choice, plan, *rest)

    tried: list[str] = []
    monkeypatch.setattr("cpcompile.compile.transform.shard_graph", refuse)
    options = {"world_size": 3, "balancer": balancer}
    if balancer == "auto":
        cpcompile.verify(PackedLM(), packed_batch("off_edges", 1), **options).raise_if_wrong()
        assert tried[0] == "balanced" and tried[1:] in (["zig_zag"], ["contiguous"])
    else:
        with pytest.raises(NoRule, match="outside the sequence"):
            cpcompile.verify(PackedLM(), packed_batch("off_edges", 1), **options)
