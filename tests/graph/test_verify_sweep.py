"""Several numbers of ranks and lengths in one call: a table, plain data, an exit code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from cpcompile import ConfigError, InputError, VerificationError, verify, verify_sweep
from cpcompile.inspect.definitions import COLLECTIVES
from tests.graph.small_models import Logits, TinyLM, batch

DOUBLE = torch.float64
all_reduce = torch.ops.cpcompile.all_reduce.default


def tokens(length: int) -> dict[str, Any]:
    """Return inputs without labels."""
    return {"input_ids": batch(length)["input_ids"]}


def test_a_table_of_all_cases() -> None:
    told: list[Any] = []
    found = verify_sweep(TinyLM(), batch, world_sizes=[2, 3], lengths=[5, 8], dtype=DOUBLE, told=told.append)
    assert (found.ok, found.exit_code, tuple(told)) == (True, 0, found.cases)
    assert [(case.tokens, case.world_size) for case in found.cases] == [(5, 2), (5, 3), (8, 2), (8, 3)]
    head, *rows, count = str(found).splitlines()
    assert head.split()[:3] == ["ranks", "tokens", "verdict"]
    assert [row.split()[:3] for row in rows] == [[str(c.world_size), str(c.tokens), "exact"] for c in found.cases]
    assert count == "4 exact"
    # What is found for one case is what `verify` finds.
    alone = verify(TinyLM(), batch(5), world_size=3, dtype=DOUBLE)
    assert dict(found.cases[1].gradient_errors) == dict(alone.gradient_errors)
    assert rows[1].split()[-2:] == [f"{alone.worst_gradient[1]:.1e}", f"{alone.tolerance:.1e}"]


def test_a_refusal_does_not_hide_the_others() -> None:
    found = verify_sweep(TinyLM(), batch(7), world_sizes=[2, 3], inner_size=2, strategy="usp")
    assert ([case.verdict for case in found.cases], found.exit_code) == (["exact", "refused"], 2)
    assert str(found).splitlines()[-2:] == [
        "3 ranks, 7 tokens:", "inner_size=2 does not divide world_size=3."
    ]  # fmt: skip
    assert found.to_dict()["cases"][1]["error"] == "ConfigError"
    json.loads(json.dumps(found.to_dict(), allow_nan=False))


def test_wrong_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COLLECTIVES, all_reduce, lambda calls: [c["x"] for c in calls])
    found = verify_sweep(TinyLM(), batch(8), world_sizes=[1, 2], dtype=DOUBLE)
    assert ([case.verdict for case in found.cases], found.exit_code) == (["exact", "WRONG"], 1)
    with pytest.raises(VerificationError, match="first diverging node: cross_entropy_loss"):
        found.raise_if_wrong()


def test_a_crash_is_told_with_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(calls: list[Any]) -> list[Any]:
        raise RuntimeError("no such machine")

    monkeypatch.setitem(COLLECTIVES, all_reduce, crash)
    found = verify_sweep(TinyLM(), batch(8), world_sizes=[2])
    assert (found.cases[0].verdict, found.exit_code) == ("failed", 2)
    assert "Traceback" in str(found)
    assert "no such machine" in str(found)


def test_says_what_stands_for_the_loss() -> None:
    found = verify_sweep(Logits(), tokens, world_sizes=[2, 4], lengths=[5])
    assert found.cases[0].stand_in == "a fixed random projection of the output [2, 5, 13]"
    assert "The model returns no loss: a fixed random projection of the output [2, 5, 13]" in str(found)
    assert "the model returns none: a fixed random projection of the output" in found.cases[0].text
    assert not verify(Logits(), tokens(5), world_size=2, objective=lambda logits: logits.sum()).stand_in


def test_nothing_to_differentiate() -> None:
    class Labels(Logits):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return self.logits(input_ids).argmax(-1)

    with pytest.raises(InputError, match="returns nothing to differentiate"):
        verify(Labels(), tokens(5), world_size=2)


@pytest.mark.parametrize(("inputs", "lengths"), [(batch, []), (batch(5), [5])])
def test_lengths_are_for_a_function(inputs: Any, lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        verify_sweep(TinyLM(), inputs, world_sizes=[2], lengths=lengths)
