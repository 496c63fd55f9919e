"""Passes and the plan are artifacts of torch's traces, made only where somebody traces."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import cpcompile
from cpcompile import _torch
from tests.models import batch, make


class Records(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


@pytest.fixture
def traced() -> Iterator[Records]:
    log, handler = logging.getLogger("torch.__trace"), Records()
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def test_each_pass_that_changes_something_is_an_artifact(traced: Records) -> None:
    model = make("llama", num_layers=1)
    cpcompile.explain(model, batch(model, 12), world_size=2)
    of_ours = {
        record.metadata["artifact"]["name"]: record.payload
        for record in traced.kept
        if record.metadata.get("artifact", {}).get("name", "").startswith("cpcompile_after_")
    }
    assert {"cpcompile_after_find_attention", "cpcompile_after_place_tokens"} <= of_ours.keys()
    assert "shard_tokens" in of_ours["cpcompile_after_place_tokens"]


def test_nothing_is_made_where_nobody_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    _torch.trace_artifact("name", lambda: pytest.fail("made"))


def test_logs_are_those_of_torch(caplog: pytest.LogCaptureFixture) -> None:
    """`TORCH_LOGS=+cpcompile` sets the level of this logger."""
    with caplog.at_level(logging.DEBUG, logger="cpcompile"):
        model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
        cpcompile.explain(model, {"input": torch.zeros(1, 8, dtype=torch.int64)}, world_size=2, token_dims={"input": 1})
    assert "pass place_tokens changed" in caplog.text
