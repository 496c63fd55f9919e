"""The command line: help at once, errors in one line, exit codes."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import cpcompile
from cpcompile.cli import app
from cpcompile.commands.explain import app as explain_app
from cpcompile.errors import NoRule
from tests.train_support import save_tiny_llama

FACTORY = """
import torch

def model():
    return torch.nn.Linear(2, 2)

def with_inputs():
    return torch.nn.Linear(2, 2), {"input": torch.zeros(1, 4, 2)}
"""


class Report:
    """Stands for what `verify` returns."""

    def __init__(self, ok: bool) -> None:
        self.ok = ok

    def __str__(self) -> str:
        return "the report"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_factory.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("command", ["train", "explain", "verify", "diff", "tune"])
def test_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output


def test_module() -> None:
    done = subprocess.run([sys.executable, "-m", "cpcompile", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in ("train", "explain", "verify", "diff", "tune"))


def test_an_error_is_its_message_and_exit_code_2(tmp_path: Path) -> None:
    result = invoke("train", "--text", str(tmp_path / "nowhere.txt"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --text ")
    assert "Traceback" not in result.stderr


def test_the_untouched_model_is_for_one_rank() -> None:
    result = invoke("train", "--no-apply", "--ranks", "2")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 1)])
def test_verify_exit_code(factory: None, monkeypatch: pytest.MonkeyPatch, ok: bool, code: int) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        cpcompile, "verify", lambda model, inputs, **given: seen.update(given) or Report(ok), raising=False
    )
    given = ("--world-size", "4", "--inner-size", "2", "--strategy", "usp", "--exact-dropout")
    result = invoke("verify", "my_factory:with_inputs", *given)
    assert (result.exit_code, result.output) == (code, "the report\n")
    assert seen == {
        "world_size": 4, "inner_size": 2, "strategy": "usp", "balancer": "auto", "exact_dropout": True
    }  # fmt: skip


def test_explain_a_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[Any] = []
    monkeypatch.setattr(
        cpcompile,
        "explain",
        lambda model, inputs, **given: shapes.append(inputs["labels"].shape) or "a plan",
        raising=False,
    )
    result = invoke("explain", str(save_tiny_llama(tmp_path / "tiny")), "--length", "31", "--batch-size", "2")
    assert (result.exit_code, result.output) == (0, "a plan\n")
    assert shapes == [(2, 31)]


def test_a_model_folder_is_explained_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_llama(tmp_path / "tiny")
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    seen: list[Any] = []
    monkeypatch.setattr(
        cpcompile, "explain", lambda model, inputs, **given: seen.append(model) or "a plan", raising=False
    )
    assert invoke("explain", str(folder), "--no-memory").exit_code == 0
    assert {p.device.type for p in seen[0].parameters()} == {"meta"}


def test_every_option_of_config_is_one_of_explain(factory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        cpcompile, "explain", lambda model, inputs, **given: seen.update(given) or "a plan", raising=False
    )
    shown = {parameter.name for parameter in typer.main.get_command(explain_app).params}
    left_out = {"memory", "optimizer_states", "sync_weights", "check_inputs", "dynamic"}
    assert {each.name for each in fields(cpcompile.Config)} - left_out <= shown
    given = ("--no-strict", "--token-dims", "x=1", "--token-local", "a.b", "--token-local", "C", "--loss-chunk", "64")
    assert invoke("explain", "my_factory:with_inputs", *given, "--inner-options", "shape_padding=true").exit_code == 0
    assert (seen["strict"], seen["token_dims"], seen["token_local"]) == (False, {"x": 1}, ["a.b", "C"])
    assert (seen["loss_chunk"], seen["inner_options"]) == (64, {"shape_padding": True})
    assert "strategy" not in seen


def test_a_choice_that_is_none_names_those_there_are(factory: None) -> None:
    result = invoke("explain", "my_factory:with_inputs", "--strategy", "rign")
    assert result.exit_code == 2
    assert "ring" in result.stderr and "ulysses" in result.stderr


def test_a_machine_that_is_none(factory: None) -> None:
    result = invoke("explain", "my_factory:with_inputs", "--device", "h101")
    assert result.exit_code == 2
    assert "'h100'" in result.stderr
    result = invoke("explain", "my_factory:with_inputs", "--device", "h100", "--gpus", "3", "--hosts", "2")
    assert (result.exit_code, "3 GPUs are not on 2 hosts" in result.stderr) == (2, True)


def test_tune_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("tune")
    assert (result.exit_code, "torch sees none here" in result.stderr) == (2, True)


def test_versions() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.splitlines()[:2] == [f"cpcompile {cpcompile.__version__}", f"torch {torch.__version__}"]


def test_explain_takes_the_options_of_attention(factory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        cpcompile, "explain", lambda model, inputs, **given: seen.update(given) or "a plan", raising=False
    )
    given = ("--strategy", "halo", "--kernel", "math", "--heads-per-message", "2")
    assert invoke("explain", "my_factory:with_inputs", *given).exit_code == 0
    assert (seen["strategy"], seen["kernel"], seen["heads_per_message"], seen["inner_size"]) == ("halo", "math", 2, 0)


def test_an_error_of_the_pass_is_shown_whole(factory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **given: Any) -> None:
        raise NoRule("aten.foo cannot be sharded:\n  the user's line")

    monkeypatch.setattr(cpcompile, "explain", refuse, raising=False)
    result = invoke("explain", "my_factory:with_inputs")
    assert (result.exit_code, result.stderr) == (2, "error: aten.foo cannot be sharded:\n  the user's line\n")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere", "nowhere: neither a model folder nor module:factory."),
        ("no_such_module:model", "No module named 'no_such_module'"),
        ("my_factory:nothing", "my_factory has no function 'nothing'."),
        ("my_factory:model", "let the factory return (model, inputs)"),
    ],
)
def test_targets_that_are_none(factory: None, target: str, message: str) -> None:
    result = invoke("explain", target)
    assert result.exit_code == 2
    assert message in result.stderr
