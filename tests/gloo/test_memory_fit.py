"""`memory='fit'`: all ranks find one plan that fits, train exactly with it, or refuse alike."""

from __future__ import annotations

import copy
import unittest.mock
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import cpcompile
from cpcompile.front.apply import parallel_forward
from tests.graph.test_memory import WIDTH, Block, Stack, ledger, tokens

LENGTH, LAYERS = 512, 2
EXACT = 1e-12  # float64, relative to the largest gradient


def trained(rank: Any, limits: list[float], wrapper: str) -> tuple[float, float, float]:
    """Return the budget that was chosen, and the errors of loss and gradients; each rank has a limit of its own."""
    torch._dynamo.reset()
    model, alone, inputs = Stack(LAYERS).double(), Stack(LAYERS).double(), tokens(LENGTH)
    mesh = rank.mesh()
    if wrapper == "fsdp":
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    options = {"grad_sync": "mean"} if wrapper == "ddp" else {}
    cpcompile.apply(model, mesh, inner="aot_eager", memory="fit", optimizer_states=0, strategy="ring", **options)
    parallel = parallel_forward(model)
    if wrapper == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group())
    has = unittest.mock.patch("cpcompile.front.memory_plan.usable_bytes", lambda *_: int(limits[rank.rank]))
    with has:
        with torch.no_grad():
            model(**inputs)  # nothing is decided for what has no backward
        loss = model(**inputs)
    expected = alone(**inputs)
    loss.backward()
    expected.backward()
    longer = tokens(LENGTH + 32)  # the plan stays
    assert torch.allclose(model(**longer).detach(), alone(**longer).detach(), rtol=EXACT)
    largest = max(float(p.grad.abs().max()) for p in alone.parameters())
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    errors = [float((g - p.grad).abs().max()) for g, p in zip(grads, alone.parameters(), strict=True)]
    return parallel.config.memory_budget, abs(float(loss - expected)) / float(expected), max(errors) / largest


def peak(**options: Any) -> float:
    """Return the predicted peak in bytes, twice that of float32."""
    return 2 * ledger(LENGTH, layers=LAYERS, inner="aot_eager", strategy="ring", optimizer_states=0, **options).peak


WRAPPERS: dict[str, dict[str, Any]] = {
    "": {},
    "fsdp": {"fully_sharded": cpcompile.FullySharded(2)},
    "ddp": {"ddp": True, "grad_sync": "mean"},
}


@pytest.mark.parametrize("wrapper", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("", "ddp"))])
def test_ranks_take_the_plan_that_fits_the_smallest(pool: Any, wrapper: str) -> None:
    options = WRAPPERS[wrapper]
    whole, half = peak(**options), peak(memory_budget=0.5, **options)
    if wrapper == "ddp":  # without its copies of gradients all would fit
        assert peak(grad_sync="mean") < (whole + half) / 2
    results = pool.run(2, trained, [whole * 2, (whole + half) / 2], wrapper)
    budgets = {budget for budget, *_ in results}
    assert len(budgets) == 1 and 0.25 <= budgets.pop() < 1
    assert max(error for _, *errors in results for error in errors) < EXACT


def refused(rank: Any, memory: str) -> str:
    torch._dynamo.reset()
    model = Stack()
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", memory=memory)
    try:
        model(**tokens(LENGTH))
    except cpcompile.ConfigError as error:
        return str(error)
    return ""


def test_what_does_not_fit_is_refused_on_all_ranks(pool: Any) -> None:
    small, without = pool.run(2, refused, "fit:0.0001"), pool.run(2, refused, "fit")
    assert all("a step needs" in text and "fully_shard" in text for text in small)
    assert all("memory='fit:40'" in text for text in without)


class BreaksOnOneRank(Stack):
    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.distributed.get_rank() == 0:
            torch._dynamo.graph_break()
        return super().forward(input_ids, labels)


def failing(rank: Any) -> str:
    torch._dynamo.reset()
    model = BreaksOnOneRank()
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", memory="fit:1")
    try:
        model(**tokens(LENGTH))
    except cpcompile.CPError as error:
        return type(error).__name__
    return ""


def test_a_rank_that_fails_alone_ends_the_others(pool: Any) -> None:
    assert pool.run(2, failing) == ["GraphBreakError", "RankFailed"]


class Averaging(Block):
    """Reads a running mean, and updates it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        out = torch.tanh(y * (1 + self.mean))
        self.mean.mul_(0.9).add_(y.detach().mean((0, 1)), alpha=0.1)
        return out


class Averages(Stack):
    def __init__(self) -> None:
        super().__init__(2)
        self.blocks = nn.ModuleList(Averaging() for _ in range(2))


def averaged(rank: Any, inner: str, memory_budget: float) -> float:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Averages().double()
    alone, inputs, worst = copy.deepcopy(model), tokens(LENGTH), 0.0
    cpcompile.apply(model, rank.mesh(), inner=inner, memory_budget=memory_budget)
    for _ in range(2):
        for each in (model, alone):
            each.zero_grad()
            each(**inputs).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            worst = max(worst, float((p.grad - q.grad).abs().max() / q.grad.abs().max()))
    return worst


@pytest.mark.parametrize(
    ("inner", "memory_budget"),
    [("aot_eager", 0.0), ("inductor", 1.0), pytest.param("inductor", 0.0, marks=pytest.mark.slow)],
)
def test_a_buffer_that_is_overwritten_is_read_as_it_was(pool: Any, inner: str, memory_budget: float) -> None:
    """torch.compile alone computes values again from what the buffer holds by then."""
    assert max(pool.run(2, averaged, inner, memory_budget, timeout=200)) < 1e-9
