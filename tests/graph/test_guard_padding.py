"""Operators that are not finite everywhere take a number where they are, in slots that hold no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import verify
from cpcompile.inspect.verify import Verifier
from cpcompile.passes import find_token_local, guard_padding, place_tokens
from tests.graph.small_models import TinyLM, batch, before, count, planned
from tests.undefined import STEPS, Rows, causal_attention, embedding, ids, ratio_to_the_next, roll, token_local

aten = torch.ops.aten
BY_NAME = {step.__name__: step for step in STEPS}


def guarded(model: torch.nn.Module, inputs: dict[str, Any], world_size: int = 3, **options: Any) -> tuple[int, Any]:
    """Return how many operands the pass fills, and the graph."""
    transformed = planned(model, inputs, world_size=world_size, **options)
    gm = before(transformed, find_token_local, place_tokens)
    return guard_padding(gm, plan=transformed.plan), gm


@pytest.mark.parametrize("name", BY_NAME)
def test_gradients_are_those_of_one_device(name: str) -> None:
    run = Verifier(Rows(BY_NAME[name]), {"input_ids": ids(11)}, dtype=torch.float64)
    for world_size, balancer in ((2, "contiguous"), (3, "zig_zag"), (4, "zig_zag")):
        found = run(world_size=world_size, balancer=balancer)
        assert found.ok and not found.not_finite, f"{world_size} {balancer}\n{found}"


@pytest.mark.parametrize("name", ["ratio_to_the_next", "of_a_range", "scan_of_a_range"])
def test_slots_outside_a_range_are_no_tokens_either(name: str) -> None:
    found = verify(Rows(BY_NAME[name]), {"input_ids": ids(12)}, world_size=2, dtype=torch.float64)
    assert found.ok and not found.not_finite, found


def test_documents_leave_padding_on_other_ranks() -> None:
    position_ids = torch.tensor([[*range(4), *range(5), *range(2)]]).expand(2, -1)

    class Packed(Rows):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:  # type: ignore[override]
            document = (position_ids == 0).cumsum(-1)
            is_seen = document[:, None, :, None] == document[:, None, None]
            is_seen = is_seen & torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            x = self.first(self.embedding(input_ids))
            q, k, v = (t.unsqueeze(1) for t in (self.q(x), self.k(x), x))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=is_seen).squeeze(1)
            return self.last(y / y.norm(dim=-1, keepdim=True)).square().mean()

    inputs = {"input_ids": ids(11), "position_ids": position_ids}
    found = verify(Packed(causal_attention), inputs, world_size=3, balancer="balanced", dtype=torch.float64)
    assert found.ok and not found.not_finite, found


@pytest.mark.parametrize("step", [roll, causal_attention])
def test_fills_what_is_divided_by(step: Any) -> None:
    number, gm = guarded(Rows(step), {"input_ids": ids(11)})
    assert number == 1
    (quotient,) = gm.graph.find_nodes(op="call_function", target=aten.div.Tensor)
    assert quotient.args[1].target is aten.masked_fill.Scalar
    assert quotient.args[0].target is not aten.masked_fill.Scalar


def test_fills_what_is_outside_a_range_where_all_slots_hold_tokens() -> None:
    number, _ = guarded(Rows(ratio_to_the_next), {"input_ids": ids(12)})
    assert number == 1


@pytest.mark.parametrize(
    ("step", "length", "dynamic"),
    [
        pytest.param(roll, 12, False, id="no slot is padding"),
        pytest.param(embedding, 11, True, id="padding repeats tokens"),
    ],
)
def test_leaves_others_alone(step: Any, length: int, dynamic: bool) -> None:
    transformed = planned(Rows(step), {"input_ids": ids(length)}, world_size=3, dynamic=dynamic)
    gm = before(transformed, find_token_local, place_tokens)
    text = str(gm.graph)
    assert guard_padding(gm, plan=transformed.plan) == 0
    assert str(gm.graph) == text


def rms_norm(logits: Tensor, labels: Tensor) -> Tensor:
    y = logits * torch.rsqrt(logits.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(logits.dtype)
    y = F.normalize(y, dim=-1) / (1 + y.abs()).sqrt()
    return F.cross_entropy(y.flatten(0, 1), labels.flatten())


def test_an_epsilon_needs_no_guard() -> None:
    number, _ = guarded(TinyLM(rms_norm), batch(11), dynamic=True)
    assert number == 0


def test_a_region_of_rows_takes_rows_of_tokens() -> None:
    number, gm = guarded(Rows(token_local), {"input_ids": ids(11)}, dynamic=True)
    assert number == 1
    (rows,) = gm.graph.find_nodes(op="call_function", target=aten.where.self)
    assert {user.target for user in rows.users} == {aten.linalg_vector_norm.default, aten.div.Tensor}


@pytest.mark.parametrize("step", [roll, ratio_to_the_next, token_local])
def test_a_second_run_changes_nothing(step: Any) -> None:
    transformed = planned(Rows(step), {"input_ids": ids(11)}, world_size=3, dynamic=True)
    gm = before(transformed, find_token_local, place_tokens, guard_padding)
    assert count(gm, aten.masked_fill.Scalar) + count(gm, aten.where.self)
    text = str(gm.graph)
    assert guard_padding(gm, plan=transformed.plan) == 0
    assert str(gm.graph) == text
