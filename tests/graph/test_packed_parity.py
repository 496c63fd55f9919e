"""Packed batches on P ranks in lockstep against one device, and against their documents one by one: loss and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import cpcompile
from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS
from cpcompile.capture.dynamo import compile_whole, token_length
from cpcompile.inspect.model_runs import LockstepBackend
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from tests.models import error, errors, gradients
from tests.packing import MIXES, PackedLM, one_by_one, packed_batch

STRATEGIES, WORLD_SIZES = ("ring", "gather", "ulysses", "usp"), (2, 3, 4, 8)
ALL_LAYOUTS = (*LAYOUTS, *DOCUMENT_LAYOUTS)
ALL = list(itertools.product(STRATEGIES, ALL_LAYOUTS, WORLD_SIZES, (1, 3)))
# Every strategy and every layout with every P and both batch sizes; the runtime has them all in tests/gloo/test_attention.py.
SAMPLE = [
    (strategy, layout, WORLD_SIZES[(i + j) % 4], 1 + 2 * ((i + j // 2) % 2))
    for i, strategy in enumerate(STRATEGIES)
    for j, layout in enumerate(ALL_LAYOUTS)
    if (i + j) % 2 == 0 or layout == "balanced"
]
EXACT = 1e-12  # float64 rounding of some thousand additions; a token at another place is off by more than 1e-3


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def model_in_float64() -> PackedLM:
    torch.manual_seed(0)
    return PackedLM().double()


def train(model: PackedLM, forward: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the loss and the gradients."""
    loss = forward(inputs)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def check(strategy: str, layout: str, world_size: int, batch_size: int) -> None:
    """Run every mix of documents through one compiled program."""
    model = model_in_float64()
    config = Config(strategy=strategy, balancer=layout)
    inner = 0 if strategy != "usp" else 2 if world_size % 2 == 0 else world_size
    ranks = LockstepBackend(config, Axis.in_process(world_size, inner), False)
    forward = compile_whole(model.forward, ranks, config)

    def in_parallel(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        token_length(inputs, config, mark_dynamic=True)
        return forward(**inputs)["loss"]

    for mix in MIXES:
        inputs = packed_batch(mix, batch_size)
        found = train(model, in_parallel, inputs)
        for name, expected in (
            ("one device", train(model, lambda given: model(**given)["loss"], inputs)),
            ("one by one", train(model, lambda given: one_by_one(model, given), inputs)),
        ):
            wrong = {"loss": error(found["loss"], expected["loss"])}
            wrong |= errors(*({n: x for n, x in given.items() if n != "loss"} for given in (found, expected)))
            assert max(wrong.values()) < EXACT, (mix, name, wrong)


@pytest.mark.parametrize(("strategy", "layout", "world_size", "batch_size"), SAMPLE)
def test_sample(strategy: str, layout: str, world_size: int, batch_size: int) -> None:
    check(strategy, layout, world_size, batch_size)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "layout", "world_size", "batch_size"), ALL)
def test_all(strategy: str, layout: str, world_size: int, batch_size: int) -> None:
    check(strategy, layout, world_size, batch_size)


def test_auto_follows_documents_where_that_pays() -> None:
    """On GPUs with many tokens; `explain` plans for one, since a model on the meta device has no other."""
    with torch.device("meta"):
        model = PackedLM()
        inputs = {name: torch.zeros(1, 1 << 20, dtype=torch.long) for name in ("input_ids", "labels", "position_ids")}
    assert cpcompile.explain(model, inputs, world_size=8).layout == "balanced"
