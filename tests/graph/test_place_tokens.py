"""Tokens are placed: what meets the sharded stream is local, what does not stays whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cpcompile import verify
from cpcompile.ir.annotation import annotate, annotation, placement_of
from cpcompile.ir.placement import FULL, Full, Partial, Sharded
from cpcompile.passes import place_tokens
from tests.graph.small_models import Logits, TinyLM, batch, before, count, planned

aten, cp = torch.ops.aten, torch.ops.cpcompile


def test_shards_ids_and_labels_once() -> None:
    transformed = planned(TinyLM(), batch())
    gm = before(transformed)
    assert place_tokens(gm, plan=transformed.plan) == count(gm, cp.shard_tokens.default) == 2
    (embedding,) = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    (loss,) = gm.graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default)
    assert placement_of(embedding) == Sharded(1)
    assert annotation(loss).placement == Partial()


class Positions(Logits):
    """Adds a table of sines of the positions, and scales by a number that belongs to no token."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        positions = torch.arange(input_ids.shape[1])[:, None] * torch.ones(8)
        x = self.embedding(input_ids) + positions.cos()
        return self.head(x * self.embedding.weight.sin().sum())


def test_leaves_what_meets_no_tokens_whole() -> None:
    transformed = planned(Positions(), {"input_ids": batch()["input_ids"]})
    gm = before(transformed)
    untouched = [n for n in gm.graph.nodes if n.target in (aten.sin.default, aten.sum.default)][-2:]
    assert [n.target for n in untouched] == [aten.sin.default, aten.sum.default]
    texts = [str((n.args, n.kwargs)) for n in untouched]
    place_tokens(gm, plan=transformed.plan)
    assert [str((n.args, n.kwargs)) for n in untouched] == texts
    assert all(placement_of(n) == FULL for n in untouched)


def test_localises_a_table_where_it_is_read() -> None:
    """The cosine of all positions is not computed: the request walks up to the positions."""
    transformed = planned(Positions(), {"input_ids": batch()["input_ids"]})
    gm = before(transformed)
    place_tokens(gm, plan=transformed.plan)
    gm.graph.eliminate_dead_code()
    (cosine,) = gm.graph.find_nodes(op="call_function", target=aten.cos.default)
    assert isinstance(placement_of(cosine), Sharded)


def test_what_every_rank_needs_whole_is_computed_of_gathered_operands() -> None:
    transformed = planned(Positions(), {"input_ids": batch()["input_ids"]})
    gm = before(transformed)
    (total,) = gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    annotate(total, stays_whole=True)
    place_tokens(gm, plan=transformed.plan)
    assert placement_of(total) == FULL
    assert {operand.target for operand in total.all_input_nodes} == {cp.gather_tokens.default, aten.cos.default}


class ShiftedLabels(TinyLM):
    """Shifts its labels itself, as transformers models do."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return self.loss(self.logits(input_ids), labels)


def test_shift_runs_on_whole_labels() -> None:
    transformed = planned(ShiftedLabels(), batch())
    gm = before(transformed)
    place_tokens(gm, plan=transformed.plan)
    pads = [n for n in gm.graph.nodes if n.target in (aten.pad.default, aten.constant_pad_nd.default)]
    assert [isinstance(placement_of(n), Full) for n in pads] == [True]


class Pooled(Logits):
    """A nonlinear function of a sum over tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        total = self.logits(input_ids).sum(1)
        return (total * 2.0).tanh()


def test_partial_sum_is_reduced_before_a_nonlinear_function() -> None:
    transformed = planned(Pooled(), {"input_ids": batch()["input_ids"]})
    gm = before(transformed)
    place_tokens(gm, plan=transformed.plan)
    (tanh,) = gm.graph.find_nodes(op="call_function", target=aten.tanh.default)
    (mul,) = gm.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert annotation(mul).placement == Partial()
    assert tanh.args[0].target is cp.all_reduce.default  # type: ignore[union-attr]


class Written(Logits):
    """Writes into a whole tensor before and after a local value reads it."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        bias = torch.zeros(input_ids.shape[1], 1)
        bias[1:] = 2.0
        x = self.embedding(input_ids) + bias
        bias.add_(1.0)
        return self.head(x * bias)


class ScatteredIn(Logits):
    """Adds local values to a whole tensor in place."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        total = torch.zeros(*input_ids.shape, 8, dtype=self.head.weight.dtype)
        total += self.embedding(input_ids)
        return self.head(total)


@pytest.mark.parametrize("model", [TinyLM, Positions, ShiftedLabels, Pooled, Written, ScatteredIn])
@pytest.mark.parametrize(("length", "world_size"), [pytest.param(8, 2, marks=pytest.mark.slow), (5, 3)])
def test_keeps_numerics(model: type[nn.Module], length: int, world_size: int) -> None:
    inputs = batch(length)
    if "labels" not in model.forward.__annotations__:
        del inputs["labels"]
    for balancer in ("contiguous", "zig_zag"):
        result = verify(model(), inputs, world_size=world_size, dtype=torch.float64, balancer=balancer)
        assert result.ok, result
