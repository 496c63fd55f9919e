"""The plan that a running job has is that of `explain`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cpcompile
from tests.models import batch, make


def planned(rank: Any) -> dict[str, Any]:
    """What a running job and `explain` say of the same model."""
    torch._dynamo.reset()
    model = make("llama", num_layers=1)
    data = batch(model, 12)
    expected = cpcompile.explain(model, data, world_size=2, strategy="ulysses", inner="aot_eager")
    cpcompile.apply(model, rank.mesh(), strategy="ulysses", inner="aot_eager")
    with pytest.raises(cpcompile.ConfigError, match="call"):
        cpcompile.explanation(model)
    model(**data).loss.backward()
    found = cpcompile.explanation(model)
    return {
        "brief": found.in_brief(),
        "text": str(found).splitlines()[:5],
        "same": (found.sites, found.layout) == (expected.sites, expected.layout),
    }


def test_a_running_job_has_its_plan(pool: Any) -> None:
    first, second = pool.run(2, planned)
    assert first == second
    assert first["same"]
    assert first["brief"].startswith("2 ranks, ") and "1 x ulysses on " in first["brief"]
    assert any("1 attention(s)" in line for line in first["text"])
