"""Packed documents that are told apart by nonsense end the step, with the values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from cpcompile import InputError, verify
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.inspect.model_runs import LockstepBackend
from cpcompile.ir.operator_call import Call
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.runtime import checked_packing
from cpcompile.runtime.tokens import packing
from tests import models
from tests.graph.small_models import planned

RIGHT = {
    "cu_seqlens": [[0, 3, 8], [0, 0, 8, 8], [0, 8]],
    "positions": [[[0, 1, 2, 0, 1, 0, 0, 1]], [[0, 1, 2, 3, 4, 5, 6, 7], [0] * 8]],
    "ids": [[[7, 7, 3, 3, 3, 9, 1, 1]], [[0] * 8, list(range(8))]],
}
WRONG = {
    "cu_seqlens": [[1, 3, 8], [0, 5, 3, 8], [0, 3, 7], [0, 3, 9], [3, 8], [8], []],
    "positions": [[[1, 2, 3, 0, 1, 2, 3, 4]], [[0, 1, 2, 3, 5, 6, 7, 8]], [[0] * 8, [0, 1, 3, 4, 0, 1, 2, 3]]],
    "ids": [[[7, 7, 3, 3, 7, 7, 1, 1]], [[0] * 8, [1, 2, 1, 2, 3, 3, 3, 3]]],
}


@pytest.mark.parametrize(("kind", "told"), [(kind, told) for kind in RIGHT for told in RIGHT[kind]])
def test_what_tells_documents_apart_is_let_through(kind: str, told: list[Any]) -> None:
    given = torch.tensor(told, dtype=torch.int32)
    assert torch.equal(checked_packing(given, kind, "it", 8), given)


@pytest.mark.parametrize(("kind", "told"), [(kind, told) for kind in WRONG for told in WRONG[kind]])
def test_nonsense_is_refused_with_its_values(kind: str, told: list[Any]) -> None:
    wrong = told if kind == "cu_seqlens" else told[-1]
    with pytest.raises(InputError, match="it does not tell documents apart") as error:
        checked_packing(torch.tensor(told, dtype=torch.int64), kind, "it", 8)
    assert packing.RULES[kind] in str(error.value)
    assert str(error.value).endswith(f"Given are {wrong} for 8 tokens.")


def test_long_values_are_cut_off() -> None:
    with pytest.raises(InputError, match=r"\[1, 2, .*, 16, \.\.\.\] for 90 tokens"):
        checked_packing(torch.arange(1, 50), "cu_seqlens", "it", 90)


LENGTHS, S = [5, 1, 9, 4], 19
INPUTS = {
    "cu_seqlens": ("cu_seq_lens_q", torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)),
    "positions": ("position_ids", torch.cat([torch.arange(n) for n in LENGTHS])[None]),
    "ids:kinds": ("kinds", torch.arange(4).repeat_interleave(torch.tensor(LENGTHS))[None]),
}


def given(source: str, *, wrong: bool) -> dict[str, Any]:
    ids = torch.arange(S)[None] % models.VOCABULARY
    name, told = INPUTS[source]
    told = told.clone()
    if wrong:
        told.view(-1)[-1] = 0
    return {"input_ids": ids, "labels": ids, name: told}


@pytest.mark.parametrize(
    ("source", "layout"),
    [("cu_seqlens", "zig_zag"), ("cu_seqlens", "balanced"), ("positions", "zig_zag"), ("ids:kinds", "balanced")],
)
def test_each_source_is_checked_when_the_program_runs(source: str, layout: str) -> None:
    name, _ = INPUTS[source]
    model = models.make("llama", attn_implementation="sdpa")
    options = {"world_size": 2, "documents": source, "balancer": layout, "dtype": torch.float64}
    verify(model, given(source, wrong=False), **options).raise_if_wrong()
    inputs = given(source, wrong=True)
    if source == "positions":
        inputs[name][0, -2] = 7
    with pytest.raises(InputError, match=f"^{name} does not tell documents apart"):
        verify(model, inputs, **options)


class Varlen(nn.Module):
    """Two layers of attention over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.qkv, self.head = nn.Embedding(13, 8), nn.Linear(8, 24), nn.Linear(8, 13)

    def forward(self, input_ids: Tensor, cu_seq: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for _ in range(2):
            q, k, v = (t.unflatten(-1, (2, 4)) for t in self.qkv(x).chunk(3, -1))
            x = x + varlen_attn(q, k, v, cu_seq, cu_seq, 9, 9, window_size=(-1, 0)).flatten(-2)
        return self.head(x).sum()


def test_lengths_of_varlen_attention_are_checked_once() -> None:
    config, ids = Config(token_dims={"input_ids": 0}), torch.arange(S) % 13
    ranks = LockstepBackend(config, Axis.in_process(2), False)
    model = Varlen()
    forward = compile_whole(model.forward, ranks, config)
    forward(**by_name(model.forward, {"input_ids": ids, "cu_seq": torch.tensor([0, 5, S])}))
    assert ranks.transformed is not None
    (check,) = ranks.transformed.graph.graph.find_nodes(op="call_function", target=checked_packing._opoverload)
    assert Call.of(check)["name"] == "cu_seq_q"
    for cu_seq in ([0, 5, S - 1], [2, 5, S], [0, 9, 5, S]):
        with pytest.raises(InputError, match=f"cu_seq_q does not tell .* for {S} tokens"):
            forward(**by_name(model.forward, {"input_ids": ids, "cu_seq": torch.tensor(cu_seq)}))


@pytest.mark.parametrize(("layout", "waits"), [("zig_zag", False), ("balanced", True)])
def test_the_host_checks_where_it_waits_for_the_documents_anyway(layout: str, waits: bool) -> None:
    """With a layout of its own, queries of a gathered attention need no bounds, and nothing may wait."""
    options = {"documents": "cu_seqlens", "balancer": layout, "strategy": "ring", "dynamic": True}
    model = models.make("llama", attn_implementation="sdpa")
    found = planned(model, given("cu_seqlens", wrong=False), **options).graph.graph
    bounds = found.find_nodes(op="call_function", target=torch.ops.cpcompile.document_bounds.default)
    checks = found.find_nodes(op="call_function", target=checked_packing._opoverload)
    assert [Call.of(check)["on_host"] for check in checks] == [bool(bounds)]
    assert bool(bounds) or not waits
