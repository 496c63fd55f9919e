"""Packed sequences on gloo ranks: exact under every compiler, with one graph for all lengths and one search for documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import cpcompile
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT, LENGTHS = 1e-6, (31, 64, 97)  # transformers' models cast to float32 themselves


def packed(model: torch.nn.Module, length: int) -> dict[str, Any]:
    """Return a batch whose positions restart, at other places in each of its rows."""
    places = torch.arange(length)
    positions = torch.stack([places % 13, (places - 5) % 29])
    return batch(model, length) | {"position_ids": positions, "use_cache": False}


def trained(rank: Any, name: str, inner: str, strategy: str) -> tuple[dict[str, float], int, list[int]]:
    """Return the errors at all lengths, how many graphs there are, and how often documents were searched in each step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, alone = make(name), make(name)
    model = cpcompile.apply(model, rank.mesh(), inner=inner, strategy=strategy, balancer="zig_zag")
    found: dict[str, float] = {}
    searches = []
    for length in LENGTHS:
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            loss = loss_of(model(**packed(alone, length)))
            loss.backward()
        searches.append(sum(event.name == "cpcompile::document_bounds" for event in recorded.events()))
        expected = loss_of(alone(**packed(alone, length)))
        expected.backward()
        found[f"loss at {length}"] = error(loss, expected)
        found |= {f"{key} at {length}": x for key, x in errors(gradients(model), gradients(alone)).items()}
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"], searches


@pytest.mark.parametrize(
    ("name", "inner", "strategy", "world_size"),
    [
        ("llama", "eager", "gather", 3),
        ("llama", "aot_eager", "ring", 2),
        ("llama", "inductor", "ring", 2),
        pytest.param("llama", "inductor", "ulysses", 2, marks=pytest.mark.slow),
        pytest.param("gemma2", "inductor", "gather", 2, marks=pytest.mark.slow),
    ],
)
def test_packed_sequences(pool: Any, name: str, inner: str, strategy: str, world_size: int) -> None:
    for found, num_graphs, searches in pool.run(world_size, trained, name, inner, strategy, timeout=300):
        assert max(found.values()) < EXACT, found
        assert num_graphs == 1, "one graph serves all lengths"
        assert searches[1:] == [1, 1], "all layers share one search; the first step traces as well"
