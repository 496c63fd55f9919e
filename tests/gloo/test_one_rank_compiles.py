"""`one_rank_compiles=True`: the first rank compiles, the others find in the cache on disk what it compiled."""

from __future__ import annotations

import copy
import random
import unittest.mock
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import cpcompile
from cpcompile.front import backend
from tests.gloo.pool import Pool
from tests.graph.test_memory import Stack, tokens

EXACT = 1e-12  # float64, relative to the largest gradient
LENGTH = 64


class Scaled(Stack):
    """A model that no earlier run has compiled."""

    def __init__(self, factor: float) -> None:
        super().__init__(1)
        self.factor = factor

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids, labels) * self.factor


def trained(rank: Any, factor: float) -> tuple[int, int, float]:
    """Return how often this rank found its program in the cache, and how often it did not, and the largest error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, inputs = Scaled(factor).double(), tokens(LENGTH)
    alone = copy.deepcopy(model)
    cpcompile.apply(model, rank.mesh(), strategy="ring", one_rank_compiles=True)
    counters.clear()
    loss = model(**inputs)
    loss.backward()
    expected = alone(**inputs)
    expected.backward()
    pairs = zip(model.parameters(), alone.parameters(), strict=True)
    errors = [float((a.grad - b.grad).abs().max() / b.grad.abs().max()) for a, b in pairs]
    found = counters["aot_autograd"]
    return found["autograd_cache_hit"], found["autograd_cache_miss"], max(abs(loss.item() - expected.item()), *errors)


@pytest.fixture
def new_pool() -> Iterator[Pool]:
    """Ranks that have compiled nothing: what else a process has done may be part of how it names a program."""
    pool = Pool()
    yield pool
    pool.stop()


@pytest.mark.slow  # processes of its own
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_others_find_what_the_first_rank_compiled(new_pool: Pool, world_size: int) -> None:
    (_, misses, error), *others = new_pool.run(world_size, trained, random.random())
    assert misses > 0
    assert all(hits > 0 and not misses for hits, misses, _ in others)
    assert max(error, *(error for *_, error in others)) < EXACT


def failing(rank: Any, failing_rank: int) -> str:
    torch._dynamo.reset()
    model = Stack()
    cpcompile.apply(model, rank.mesh(), one_rank_compiles=True)

    def compile_inner(*args: Any, **kwargs: Any) -> Any:
        if rank.rank == failing_rank:
            raise MemoryError("no room for a compiler")
        return args[0].graph

    with unittest.mock.patch.object(backend, "compile_inner", compile_inner):
        try:
            model(**tokens(LENGTH))
        except Exception as error:
            return f"{type(error).__name__} {error}"
    return ""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_compile_ends_the_others(pool: Any, rank: int) -> None:
    texts = pool.run(2, failing, rank)
    assert all("no room for a compiler" in text for text in texts)
    assert texts[1 - rank].startswith("RankFailed")


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(cpcompile.ConfigError, match="leaves nothing behind: use inner='inductor'"):
        cpcompile.Config(one_rank_compiles=True, inner="aot_eager")
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        pytest.raises(cpcompile.ConfigError, match="cache on disk, which is switched off"),
    ):
        cpcompile.Config(one_rank_compiles=True)
