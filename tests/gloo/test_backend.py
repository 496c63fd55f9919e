"""`torch.compile(model, backend="cpcompile", options=...)`: found by name, refuses parts of a model, shares no stale graph."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from cpcompile.errors import ConfigError, GraphBreakError, InputError
from tests.models import RotaryLM, batch, error, errors, gradients, loss_of, make

SCRIPT = Path(__file__).with_name("without_import.py")


def run_script(folder: Path, inner: str, *jobs: str) -> list[str]:
    """Run a script that knows cpcompile by name only; return its lines."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), inner, *jobs],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_found_by_name(tmp_path: Path) -> None:
    """Through the entry point of the installed package; the script never imports cpcompile."""
    assert run_script(tmp_path, "eager", "2,zig_zag") == ["2,zig_zag: 0 cache hits"]


@pytest.mark.slow
def test_cached_graphs_are_never_stale(tmp_path: Path) -> None:
    """Jobs of other sizes and layouts whose groups have the same name: each result is checked; the last job hits the cache."""
    jobs = ["2,zig_zag", "4,zig_zag", "2,contiguous", "2,zig_zag"]
    lines = run_script(tmp_path, "inductor", *jobs)
    assert [line.partition(":")[0] for line in lines] == jobs
    assert int(lines[-1].split()[1]) > 0, "the cache is in use, or this test shows nothing"


def compile_with(rank: Any, model: nn.Module, fullgraph: bool = False, **options: Any) -> Any:
    torch._dynamo.reset()
    given = {"mesh": rank.mesh(), "inner": "eager"} | options
    return torch.compile(model, backend="cpcompile", options=given, fullgraph=fullgraph)


def refusal(kind: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    """Return the text of the `kind` that Dynamo reports as the cause."""
    with pytest.raises(BackendCompilerFailed) as caught:
        call(*args, **kwargs)
    assert type(caught.value.inner_exception) is kind, traceback.format_exception(caught.value)
    return str(caught.value.inner_exception)


def trained(rank: Any) -> dict[str, float]:
    """Errors without `fullgraph`, over several lengths, and through `Module.compile`."""
    found = {}
    for way in ("torch.compile", "Module.compile"):
        model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
        compiled = compile_with(rank, model, balancer="zig_zag")
        if way == "Module.compile":
            compiled = model
            model.compile(backend="cpcompile", options={"mesh": rank.mesh(), "inner": "eager"})
        for length in (31, 64, 97):
            inputs = batch(alone, length)
            losses = [loss_of(module(**inputs)) for module in (compiled, alone)]
            for loss in losses:
                loss.backward()
            found[f"{way} loss {length}"] = error(losses[0], losses[1])
            found |= {f"{way} {n} {length}": x for n, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.always
def test_trains_exactly(pool: Any) -> None:
    for found in pool.run(3, trained):
        assert max(found.values()) < 1e-12, found


def wrong_options(rank: Any) -> None:
    model = make("rotary", num_layers=1)
    inputs = batch(model, 31)
    text = refusal(ConfigError, compile_with(rank, model, strategi="ring"), **inputs)
    assert text.startswith("unknown option 'strategi': the options are strategy, balancer,")
    text = refusal(ConfigError, compile_with(rank, model, strategy="rings"), **inputs)
    assert (
        text == "strategy='rings' is not an option: "
        "choose one of 'auto', 'halo', 'ulysses', 'usp', 'ring', 'gather', 'latent_heads', 'latent'. Did you mean 'ring'?"
    )
    text = refusal(ConfigError, compile_with(rank, model, mesh=None), **inputs)
    assert text.startswith("mesh must be a DeviceMesh")
    text = refusal(ConfigError, compile_with(rank, model, axis="tp"), **inputs)
    assert text == "the mesh has no axis 'tp' (its axes: 'cp'; shape (2,))."
    for without in ({"strategy": "ring"}, None):
        torch._dynamo.reset()
        text = refusal(ConfigError, torch.compile(model, backend="cpcompile", options=without), **inputs)
        assert text.startswith("the mesh is missing: torch.compile(model, backend=")


def test_options_that_do_not_fit(pool: Any) -> None:
    pool.run(2, wrong_options)


class Breaks(RotaryLM):
    """Prints between its blocks, which Dynamo cannot trace."""

    def __init__(self) -> None:
        super().__init__(num_layers=1)
        self.embed = Doubled(self.embed)

    def forward(self, input_ids: Tensor, labels: Tensor, place: str) -> Tensor:
        x = self.embed(input_ids)
        if place == "line":
            torch._dynamo.graph_break()
        for block in self.blocks:
            if place == "loop":
                torch._dynamo.graph_break()
            x = block(x)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class Doubled(nn.Module):
    """A module of the user's own that would compile, and shard, by itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return 2 * self.inner(input_ids)


def broken(rank: Any) -> None:
    torch.manual_seed(0)
    model = Breaks().double()
    inputs = batch(RotaryLM(1), 32)
    text = refusal(GraphBreakError, compile_with(rank, model), **inputs, place="line")
    assert "does not trace as one graph" in text and "torch._dynamo.graph_break()" in text and __file__ in text
    # Dynamo runs `forward` as it is and would compile `Doubled.forward` alone: local tokens would meet uncompiled blocks.
    text = refusal(GraphBreakError, compile_with(rank, model), **inputs, place="loop")
    assert "x = self.embed(input_ids)" in text and __file__ in text
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_with(rank, model, fullgraph=True)(**inputs, place="loop")
    compile_with(rank, model)(**inputs, place="").backward()


def test_a_part_of_a_model_is_refused(pool: Any) -> None:
    pool.run(2, broken)


def unequal(rank: Any, mode: str) -> None:
    model = make("rotary", num_layers=1)
    compiled = compile_with(rank, model, check_inputs=mode)
    same, other = batch(model, 31), batch(model, 31, seed=rank.rank)
    if mode == "first":
        compiled(**same)
    if mode == "always":
        compiled(**same)
        with pytest.raises(InputError, match="the input 'input_ids' differs between rank 0 and rank"):
            compiled(**other)
    else:
        compiled(**other)


@pytest.mark.parametrize("mode", ["always", "first", "never"])
def test_inputs_are_compared(pool: Any, mode: str) -> None:
    pool.run(2, unequal, mode)
