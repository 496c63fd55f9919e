"""Outputs leave the graph summed or sharded, and each rank's gradient counts once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cpcompile import verify
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.passes import SHARDING, finish_outputs, place_tokens
from cpcompile.passes.finish_outputs import output_placements
from tests.graph.small_models import Logits, TinyLM, batch, before, count, planned

cp = torch.ops.cpcompile
EARLIER = SHARDING[: SHARDING.index(finish_outputs)]


class Both(TinyLM):
    """Returns the loss and the logits."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.logits(input_ids)
        return self.loss(logits, labels), logits


class Passed(TinyLM):
    """Returns an input, and a number."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.embedding(input_ids), labels


def test_loss_is_summed_and_its_gradient_divided() -> None:
    transformed = planned(Both(), batch(), world_size=4)
    gm = before(transformed, *EARLIER)
    assert finish_outputs(gm, plan=transformed.plan) == 1
    (scale,) = gm.graph.find_nodes(op="call_function", target=cp.scale_gradient.default)
    assert scale.args[0].target is cp.all_reduce.default  # type: ignore[union-attr]
    assert scale.args[1] == 1 / 4
    assert output_placements(gm) == [FULL, Sharded(1)]


def test_averaged_gradients_scale_local_outputs() -> None:
    """`mean`: a wrapper divides by P, so that what is local counts P times and what is replicated once."""
    transformed = planned(Both(), batch(), world_size=4, grad_sync="mean")
    gm = before(transformed, *EARLIER)
    finish_outputs(gm, plan=transformed.plan)
    (scale,) = gm.graph.find_nodes(op="call_function", target=cp.scale_gradient.default)
    assert scale.args[1] == 4.0
    (output,) = gm.graph.find_nodes(op="output")
    assert output.args[0].index(scale) == 1  # type: ignore[union-attr, arg-type]


def test_full_outputs_are_gathered() -> None:
    transformed = planned(Both(), batch(), world_size=4, outputs="full")
    gm = before(transformed, *EARLIER)
    assert finish_outputs(gm, plan=transformed.plan) == 2
    assert count(gm, cp.gather_tokens.default) == 1
    assert output_placements(gm) == [FULL, FULL]


def test_leaves_local_outputs_and_inputs_alone() -> None:
    transformed = planned(Passed(), batch())
    gm = before(transformed, *EARLIER)
    text = gm.graph.python_code("self").src
    assert finish_outputs(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


def test_one_rank_needs_no_scale() -> None:
    transformed = planned(Both(), batch(), world_size=1)
    gm = before(transformed, *EARLIER)
    finish_outputs(gm, plan=transformed.plan)
    assert count(gm, cp.scale_gradient.default) == 0


def test_second_run_leaves_local_outputs_alone() -> None:
    """Only of sharded outputs is this so: a loss that is scaled twice would be wrong, and the pipeline runs it once."""
    transformed = planned(Logits(), {"input_ids": batch()["input_ids"]})
    gm = before(transformed, *EARLIER, finish_outputs)
    text = gm.graph.python_code("self").src
    assert finish_outputs(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


@pytest.mark.parametrize("outputs", ["local", "full"])
@pytest.mark.parametrize("model", [Both, Logits])
def test_keeps_numerics(outputs: str, model: type[TinyLM]) -> None:
    inputs = batch(7) if model is Both else {"input_ids": batch(7)["input_ids"]}

    def objective(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return output[0] + output[1].square().mean() if isinstance(output, tuple) else output.square().mean()

    result = verify(model(), inputs, world_size=3, dtype=torch.float64, outputs=outputs, objective=objective)
    assert result.ok, result


def test_place_tokens_leaves_the_sum_to_this_pass() -> None:
    transformed = planned(TinyLM(), batch())
    assert count(before(transformed, place_tokens), cp.all_reduce.default) == 0
