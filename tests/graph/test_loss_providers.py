"""Providers of losses: exact where they can, refused with the reason where they cannot."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile import ConfigError, verify
from cpcompile.memory.workspace import workspace
from cpcompile.options.config import Config
from cpcompile.runtime.tiles import loss_providers
from cpcompile.runtime.tiles.loss_body import body_of
from cpcompile.runtime.tiles.loss_providers import CrossEntropy, obstacle
from tests import loss_stand_ins
from tests.graph import test_chunked_losses as losses
from tests.graph.small_models import VOCABULARY, TinyLM, batch, planned
from tests.graph.test_chunked_losses import CHUNKED, HeadOf, Loss

HAS_TORCH = hasattr(torch.nn.functional, "linear_cross_entropy")
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch.nn.functional.linear_cross_entropy is from torch 2.13 on")
PLAIN = [losses.shifted_by_slice, losses.cast, losses.by_nll]
BY_TOKEN = [losses.of_weighted_tokens, losses.focal]
EXACT = {
    "torch": [*PLAIN, *BY_TOKEN, losses.of_weighted_classes],
    "liger": [*PLAIN, losses.of_weighted_classes, losses.softcapped],
    "cut_cross_entropy": [*PLAIN, *BY_TOKEN, losses.softcapped],
}
CASES = [
    pytest.param(name, loss, marks=needs_torch if name == "torch" else (), id=f"{name} {loss.__name__}")
    for name, each in EXACT.items()
    for loss in each
]


def smoothed(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)


def providers(model: TinyLM, **options: Any) -> list[str]:
    """Return what computes each loss of a plan."""
    graph = planned(model, batch(11), loss_chunk=4, **options).graph.graph
    return [body_of(node.args[5]).provider for node in graph.find_nodes(op="call_function", target=CHUNKED)]


def check(model: TinyLM, world_size: int, provider: str) -> None:
    options: dict[str, Any] = {"loss_chunk": 3, "loss_provider": provider}
    found = verify(model, batch(11), world_size=world_size, dtype=torch.float64, **options)
    assert found.tolerance < 1e-12
    found.raise_if_wrong()


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_is_exact(name: str, loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    check(TinyLM(loss).double(), 3, name)


@pytest.mark.parametrize("name", [pytest.param("torch", marks=needs_torch), "liger", "cut_cross_entropy"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_on_few_ranks(name: str, world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    assert providers(TinyLM().double(), loss_provider=name) == [name]
    check(TinyLM().double(), world_size, name)


@pytest.mark.parametrize("name", [pytest.param("torch", marks=needs_torch), "liger", "cut_cross_entropy"])
def test_heads_and_what_takes_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    for spelling in ("tied", "no bias"):
        check(HeadOf(spelling).double(), 2, name)
    frozen = TinyLM(losses.mean_loss).double()
    for parameter in [*frozen.embedding.parameters(), *frozen.qkv.parameters()]:
        parameter.requires_grad_(False)
    check(frozen, 2, name)
    frozen = TinyLM(losses.mean_loss).double()
    frozen.head.weight.requires_grad_(False)
    check(frozen, 2, name)


def test_liger_smooths_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    check(TinyLM(smoothed).double(), 3, "liger")


PLAIN_LOSS = CrossEntropy(device="cuda", dtype=torch.bfloat16, loss_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "loss", "reason"),
    [
        ("liger", CrossEntropy("cpu", torch.bfloat16, torch.float32), "runs on cuda, and the model is on cpu"),
        ("liger", PLAIN_LOSS, r"is not installed \(pip install liger-kernel\)"),
        ("cut_cross_entropy", PLAIN_LOSS, r"is not installed \(pip install cut-cross-entropy\)"),
        ("own", PLAIN_LOSS, "^$"),
        pytest.param("torch", PLAIN_LOSS, "returns the loss in the dtype of hidden states", marks=needs_torch),
    ],
)
def test_limits_of_here(name: str, loss: CrossEntropy, reason: str) -> None:
    assert re.search(reason, obstacle(name, loss))


@pytest.mark.parametrize(
    ("name", "dtype", "loss_dtype", "reason"),
    [
        ("liger", torch.float64, torch.float64, "takes bfloat16, float32 and computes in float32"),
        ("cut_cross_entropy", torch.float32, torch.float32, "takes bfloat16 and computes in float32"),
        ("liger", torch.bfloat16, torch.float64, "here are torch.bfloat16 and torch.float64"),
        ("liger", torch.float16, torch.float32, "may be too large for it"),
        ("liger", torch.bfloat16, torch.float32, ""),
        ("cut_cross_entropy", torch.bfloat16, torch.float32, ""),
        pytest.param("torch", torch.float16, torch.float16, "may be too large for it", marks=needs_torch),
        pytest.param("torch", torch.bfloat16, torch.bfloat16, "", marks=needs_torch),
    ],
)
def test_limits_of_dtypes(
    name: str, dtype: torch.dtype, loss_dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = loss_providers._kernel_limits
    loss_stand_ins.install(monkeypatch)
    monkeypatch.setattr(loss_providers, "_kernel_limits", limits)
    monkeypatch.setattr(loss_providers, "is_installed", lambda module: True)
    found = obstacle(name, CrossEntropy("cuda", dtype, loss_dtype))
    assert found if reason and reason in found else not reason and not found


@pytest.mark.parametrize(
    ("name", "loss", "reason"),
    [
        pytest.param("torch", losses.softcapped, "torch has no softcap of logits", marks=needs_torch),
        pytest.param("torch", smoothed, "torch has no label smoothing in chunks", marks=needs_torch),
        ("cut_cross_entropy", smoothed, "cut_cross_entropy has no label smoothing"),
        ("cut_cross_entropy", losses.of_weighted_classes, "cut_cross_entropy has no weights of classes"),
        ("liger", losses.of_weighted_tokens, "liger multiplies gradients by one number for all tokens"),
        ("liger", losses.smoothed, "liger has no scale of logits"),
        ("liger", losses.with_z_loss, "logits are read by aten.logsumexp.default, aten.reshape.default"),
        ("liger", losses.by_log_softmax, "liger computes cross entropy alone: logits are read by aten.gather.default"),
    ],
)
def test_says_what_it_cannot_compute(name: str, loss: Loss, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    with pytest.raises(ConfigError) as error:
        providers(TinyLM(loss).double(), loss_provider=name)
    text = str(error.value)
    assert reason in text and "small_models.py" in text and "loss_provider='auto' computes every loss" in text


@pytest.mark.skipif(HAS_TORCH, reason="torch has it")
def test_an_older_torch_has_none() -> None:
    with pytest.raises(ConfigError, match=r"torch is not in torch .* \(it is from 2.13 on\)"):
        providers(TinyLM().double(), loss_provider="torch")


def test_auto_is_ours_until_another_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    model, capped = TinyLM().double(), TinyLM(losses.with_z_loss).double()
    assert providers(model) == providers(model, loss_provider="own") == [""]
    monkeypatch.setattr(loss_providers, "BY_SPEED", ("cut_cross_entropy", "own"))
    assert providers(model) == ["cut_cross_entropy"] and providers(capped) == [""]
    assert providers(TinyLM(losses.of_weighted_classes).double()) == [""]
    assert providers(model, loss_provider="own") == [""]


def test_an_old_liger_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)

    class Old:
        @staticmethod
        def forward(ctx: Any, _input: Any, linear: Any, target: Any, ignore_index: int) -> None: ...

    monkeypatch.setattr(loss_providers, "_liger", lambda: Old)
    assert "is too old" in obstacle("liger", PLAIN_LOSS)


@needs_torch
def test_the_prediction_of_memory_knows_whose_logits_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_stand_ins.install(monkeypatch)
    found = {}
    for name in ("own", "torch", "liger", "cut_cross_entropy"):
        graph = planned(TinyLM().double(), batch(11), loss_chunk=4, loss_provider=name).graph.graph
        (node,) = graph.find_nodes(op="call_function", target=CHUNKED)
        node.target = torch.ops.cpcompile.loss_chunks.default
        node.args = node.args[:-1]
        found[name] = workspace(node) // (VOCABULARY * 8)
    # Of 22 tokens; liger has a power of two of them, for logits of about the size of all hidden states.
    assert found == {"own": 4, "torch": 4, "liger": 16, "cut_cross_entropy": 0}


def test_the_options_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"loss_provider='ligr' is not an option.*liger"):
        Config(loss_provider="ligr")
    with pytest.raises(ConfigError, match="loss_chunk=0 asks for all at once"):
        Config(loss_provider="torch", loss_chunk=0)


@needs_torch
def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    benchmark = importlib.import_module("loss")
    monkeypatch.setitem(sys.modules, "loss", benchmark)  # gone behind the test
    size = ["--tokens", "20", "--vocabulary", "30", "--features", "8", "--chunk", "8", "--repeats", "1", "--check"]
    out = tmp_path / "loss.json"
    names = ["--providers", "torch", "liger"]
    benchmark.main(["--device", "cpu", "--dtype", "float32", *size, *names, "--out", str(out)])
    torch_row, liger_row = json.loads(out.read_text())["rows"]
    assert max(torch_row["error_rms"]) < 1e-5 and torch_row["ms"] > 0 and "runs on cuda" in liger_row["error"]
