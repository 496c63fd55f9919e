"""The program of every rank as Python, written without running it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile import ConfigError, FullySharded, explain
from tests.graph.small_models import TinyLM, batch
from tests.graph.test_cli import invoke
from tests.models import batch as of
from tests.models import make


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


def test_the_file_knows_what_it_calls_by_itself(tmp_path: Path) -> None:
    """In a process that has nothing of cpcompile but the file: operators, also without a loss, and functions of tiles."""
    ids = {"input_ids": batch(16)["input_ids"]}
    llama = make("llama", num_layers=1)
    for name, model, given, tile in (("no_loss", make("rotary"), ids, 0), ("tiles", llama, of(llama, 24), 8)):
        text = explain(model, given, world_size=2, tile=tile, program=True).program
        (tmp_path / f"{name}.py").write_text(text)
    check = """
import re, sys, torch
import no_loss, tiles
for name in re.findall(r"torch[.]ops[.]cpcompile[.](\\w+)", open(no_loss.__file__).read()):
    getattr(torch.ops.cpcompile, name)
tiles.register_bodies()
from cpcompile.runtime.tiles.by_rows import function_of
names = re.findall(r"cpcompile[.]by_rows.*(BODY_\\d+)", open(tiles.__file__).read())
assert names and [function_of(getattr(tiles, name)) for name in names]
"""
    found = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


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
