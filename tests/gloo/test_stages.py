"""What a first call does for so long is said, on the first rank."""

from __future__ import annotations

import contextlib
import io
import re
import time
from typing import Any

import pytest
import torch

import cpcompile
from cpcompile.capture import stages
from tests.models import batch, make


def first_and_second_call(rank: Any, patience: float) -> list[list[str]]:
    """The lines on stderr of two calls."""
    torch._dynamo.reset()
    before, stages.PATIENCE, stages.REPEAT = (stages.PATIENCE, stages.REPEAT), patience, 1000.0
    try:
        model = cpcompile.apply(make("llama", num_layers=1), rank.mesh(), inner="aot_eager")
        lines = []
        for _ in range(2):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                model(**batch(model, 12)).loss.backward()
            lines.append([line for line in stderr.getvalue().splitlines() if line.startswith("cpcompile: ")])
        return lines
    finally:
        stages.PATIENCE, stages.REPEAT = before


def test_the_first_rank_says_what_the_first_call_does(pool: Any) -> None:
    (first, second), *others = pool.run(2, first_and_second_call, 0.0)
    names = ["tracing the model", "sharding the graph", "compiling 1 of 1 (forward and backward)"]
    *said, last = [line.removeprefix("cpcompile: ") for line in first]
    assert re.fullmatch(r"2 ranks, \w+, 1 x \w+ on [\w, ]+; compiled in \d+ s", last), last
    assert [line for line in said if line.endswith("...")] == [f"{name} ..." for name in names]
    assert [line.rpartition(" took ")[0] for line in said if not line.endswith("...")] == names
    assert not second and others == [[[], []]]


def test_what_is_quick_is_not_mentioned_but_for_the_plan(pool: Any) -> None:
    (((line,), second),) = pool.run(1, first_and_second_call, 1000.0)
    assert line.startswith("cpcompile: 1 ranks, ")
    assert not second


def two_lengths(rank: Any) -> list[str]:
    """The lines on stderr of a second length, where each has a graph of its own."""
    torch._dynamo.reset()
    model = cpcompile.apply(make("llama", num_layers=1), rank.mesh(), inner="eager", dynamic=False)
    model(**batch(model, 12))
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        model(**batch(model, 16))
    return [line for line in stderr.getvalue().splitlines() if line.startswith("cpcompile: ")]


def test_what_is_compiled_again_says_why(pool: Any) -> None:
    ((line,),) = pool.run(1, two_lengths)
    assert re.fullmatch(
        r"cpcompile: compiled again in \d+ s: .*input_ids.* size mismatch at index 1.* 12.* 16", line
    ), line


def test_a_long_stage_is_mentioned_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PATIENCE", 0.01)
    monkeypatch.setattr(stages, "REPEAT", 0.05)
    with stages.stage("compiling"):
        time.sleep(0.4)
    first, *again, last = capsys.readouterr().err.splitlines()
    assert first == "cpcompile: compiling ..." and last.startswith("cpcompile: compiling took ")
    assert again and set(again) == {"cpcompile: compiling goes on: 0 s so far"}


def test_a_stage_that_fails_says_no_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "PATIENCE", 0.01)
    with pytest.raises(ValueError), stages.stage("failing"):
        time.sleep(0.3)
        raise ValueError
    assert capsys.readouterr().err == "cpcompile: failing ...\n"
