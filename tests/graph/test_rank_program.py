"""The program of every rank as Python, written without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile import ConfigError, FullySharded, explain
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_cli import invoke


def test_large_inputs_are_random_and_weights_on_meta_have_no_values() -> None:
    """Token ids have the range of the given ones; on `meta` nothing is known, and the program is one of GPUs."""
    long = explain(TinyLM(), batch(4096), world_size=2, program=True).program
    assert '"input_ids": torch.randint(0, 13, (2, 4096), dtype=torch.int64, generator=generator)' in long
    inputs = {name: x.to("meta") for name, x in batch(16).items()}
    meta = explain(TinyLM().to("meta"), inputs, world_size=2, program=True).program
    assert '"input_ids": torch.randint(0, 1, (2, 16)' in meta
    assert 'DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))' in meta


def test_each_call_is_under_its_line() -> None:
    text = explain(TinyLM(), batch(16), world_size=2, strategy="gather", program=True).program
    lines = [line.strip() for line in text.splitlines()]
    (call,) = [i for i, line in enumerate(lines) if "cpcompile.gather_attention" in line]
    above = next(line for line in reversed(lines[:call]) if line.startswith("#"))
    assert "F.scaled_dot_product_attention(q, k, v, is_causal=True)" in above
    assert "group=GROUP" in lines[call]


def test_parameters_of_fsdp_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave fully_sharded out"):
        explain(TinyLM(), batch(16), world_size=2, fully_sharded=FullySharded(2), program=True)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.py").write_text(
        "from tests.graph.small_models import TinyLM, batch\n\ndef of_length(length):\n    return TinyLM(), batch(length)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "program.py"
    shown = invoke("explain", "small:of_length", "--length", "20", "--program", str(file))
    assert shown.exit_code == 0, shown.output
    found: dict[str, Any] = {"__name__": "program"}
    exec(compile(file.read_text(), str(file), "exec"), found)
    assert found["inputs"]()["input_ids"].shape == (2, 20)
    assert isinstance(found["Program"](), torch.nn.Module)
    with pytest.raises(SystemExit, match="start the ranks: torchrun --nproc-per-node 2 "):
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "__main__", "__file__": str(file)})
    assert "the suffix says what is written" in invoke("explain", "small:of_length", "--program", "x.txt").output
