"""`verify_real` starts processes of its own and says what each did."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from cpcompile import verify_real
from tests.graph.small_models import Logits, TinyLM, batch

pytestmark = pytest.mark.slow  # each rank imports torch


def with_loss() -> tuple[Any, Any]:
    return TinyLM(), batch(9)


def without_loss() -> tuple[Any, Any]:
    return Logits(), {"input_ids": batch(9)["input_ids"]}


class Median(TinyLM):
    """Refused along the tokens."""

    def logits(self, input_ids: Any) -> Any:
        x = self.embedding(input_ids)
        return self.head(x + x.median())


def refused() -> tuple[Any, Any]:
    return Median(), batch(9)


def dying() -> tuple[Any, Any]:
    if os.environ["RANK"] == "1":
        raise RuntimeError("this rank has no weights")
    return TinyLM(), batch(9)


def killed() -> tuple[Any, Any]:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return TinyLM(), batch(9)


def wrong() -> tuple[Any, Any]:
    """A model of which rank 1 has labels of its own, which nobody checks."""
    given = batch(9)
    if os.environ["RANK"] == "1":
        given["labels"] = torch.zeros_like(given["labels"])
    return TinyLM(), given


def test_exact() -> None:
    found = verify_real(with_loss, world_size=2, inner="eager")
    assert found.ok, found.text
    assert len(found.loss) == 2
    assert set(found.gradient_errors) == {name for name, _ in TinyLM().named_parameters()}
    assert found.text.startswith("exact for 2 processes (gloo), layout ")


def test_what_stands_for_the_loss() -> None:
    found = verify_real(without_loss, world_size=2, inner="eager")
    assert found.ok, found.text
    assert found.stand_in == "a fixed random projection of the output [2, 9, 13]"


def test_wrong() -> None:
    found = verify_real(wrong, world_size=2, inner="eager", check_inputs="never")
    assert found.verdict == "WRONG", found.text
    assert not found.gradient_errors["head.weight"] < found.tolerance


def test_a_refusal() -> None:
    found = verify_real(refused, world_size=2, inner="eager")
    assert (found.verdict, found.error) == ("refused", "NoRule"), found.text


@pytest.mark.parametrize(("make", "reason"), [(dying, "this rank has no weights"), (killed, "SIGKILL")])
def test_a_rank_that_dies_is_named(make: Any, reason: str) -> None:
    found = verify_real(make, world_size=2, inner="eager")
    assert found.verdict == "failed"
    assert found.text.startswith("rank 1 of 2 died")
    assert reason in found.text
