"""Minify finds a few calls that fail as the model does, and writes a file that shows it."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cpcompile import CPError, VerificationError, minify
from cpcompile.inspect.definitions import COLLECTIVES
from tests.graph.small_models import TinyLM, batch


class Refused(TinyLM):
    """Takes the median over all tokens, in the middle of the model."""

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = x + self.attend(x)
        x = x + x.median().tanh()
        return self.head(x + self.attend(x))


def test_a_refusal(tmp_path: Path) -> None:
    path = tmp_path / "small.py"
    found = minify(Refused(), batch(24), world_size=2, path=path)
    assert (found.failure.kind, found.failure.operator) == ("NoRule", "aten.median")
    assert found.num_calls <= 3
    assert "TinyLM" not in found.text
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "NoRule: aten.median" in done.stderr


def test_a_wrong_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "small.py"
    all_reduce = torch.ops.cpcompile.all_reduce.default
    monkeypatch.setitem(COLLECTIVES, all_reduce, lambda calls: [c["x"] for c in calls])
    found = minify(TinyLM(), batch(24), world_size=2, dtype=torch.float64, path=path)
    assert found.failure.kind == "WRONG"
    assert found.num_calls <= 3
    with pytest.raises(VerificationError, match="WRONG"):
        runpy.run_path(str(path), run_name="__main__")
    monkeypatch.undo()
    runpy.run_path(str(path), run_name="__main__")


def test_what_is_exact_has_nothing_to_show() -> None:
    with pytest.raises(CPError, match="nothing is WRONG"):
        minify(TinyLM(), batch(9), world_size=2)
