"""The command line: help at once, errors in one line, exit codes."""

import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

import cpcompile
from cpcompile import cli, names
from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS
from cpcompile.cli import app
from cpcompile.commands import verify as command
from cpcompile.commands.explain import app as explain_app
from cpcompile.errors import NoRule
from cpcompile.inspect import sweep
from cpcompile.options.config import CHOICES
from cpcompile.runtime import kernels
from cpcompile.runtime.attention.catalogue import STRATEGIES
from cpcompile.runtime.tiles import loss_providers
from tests.train_support import save_tiny_llama

FACTORY = """
import torch

def model():
    return torch.nn.Linear(2, 2)

def with_inputs():
    return torch.nn.Linear(2, 2), {"input": torch.zeros(1, 4, 2)}

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

def of_length(length):
    return Model(), {"input_ids": torch.arange(length)[None] % 7}

def fails():
    raise RuntimeError("no weights")
"""


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


def test_train_has_the_choices_of_config() -> None:
    for name, offered in (("strategy", cli.Strategy), ("kernel", cli.Kernel), ("inner", cli.Inner)):
        assert {"auto", *CHOICES[name]} == {choice.value for choice in offered}
    assert CHOICES["balancer"] == cli.BALANCERS


def test_names_are_those_of_what_bears_them() -> None:
    assert tuple(STRATEGIES) == names.STRATEGIES
    assert (*LAYOUTS, *DOCUMENT_LAYOUTS) == names.BALANCERS
    assert kernels.NAMES == names.KERNELS
    assert (loss_providers.OWN, *loss_providers.PROVIDERS) == names.LOSS_PROVIDERS


@pytest.mark.parametrize("command", ["explain", "verify", "diff", "tune", "plot", "explain-profile", "train"])
def test_help_needs_no_torch(command: str) -> None:
    help_text = f"from cpcompile.cli import app\ntry: app(['{command}', '--help'])"
    run = f"import sys\n{help_text}\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_an_error_is_its_message_and_exit_code_2(tmp_path: Path) -> None:
    result = invoke("train", "--text", str(tmp_path / "nowhere.txt"))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --text ")
    assert "Traceback" not in result.stderr


def test_the_untouched_model_is_for_one_rank() -> None:
    result = invoke("train", "--no-apply", "--ranks", "2")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 2)  # the message, and where to read more


def test_finite_numbers_are_checked_in_what_is_applied() -> None:
    result = invoke("train", "--no-apply", "--ranks", "1", "--check-finite", "step")
    assert (result.exit_code, "error: --check-finite runs what --no-apply" in result.stderr) == (2, True)


@pytest.mark.parametrize(("verdict", "code"), [("exact", 0), ("WRONG", 1), ("refused", 2), ("failed", 2)])
def test_verify_exit_code(factory: None, monkeypatch: pytest.MonkeyPatch, verdict: str, code: int) -> None:
    seen: dict[str, Any] = {}
    found = sweep.Sweep((sweep.Case(world_size=4, tokens=4, verdict=verdict, text="the report"),))
    monkeypatch.setattr(sweep, "verify_sweep", lambda model, inputs, **given: seen.update(given) or found)
    given = ("--world-size", "4", "--world-size", "6", "--inner-size", "2", "--strategy", "usp", "--exact-dropout")
    result = invoke(
        "verify", "my_factory:with_inputs", *given, "--token-dim", "input=1", "--dtype", "float64", "--constant", "a"
    )
    assert (result.exit_code, result.output) == (code, "the report\n")
    assert (seen["world_sizes"], seen["inner_size"], seen["dtype"]) == ([4, 6], 2, torch.float64)
    assert (seen["strategy"], seen["exact_dropout"], seen["token_dims"]) == ("usp", True, {"input": 1})
    assert seen["constants"] == ["a"]


def test_verify_prints_json(factory: None) -> None:
    result = invoke("verify", "my_factory:of_length", "--length", "6", "--length", "7", "--world-size", "2", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["exit_code"]) == (0, 0)
    assert [(case["tokens"], case["verdict"]) for case in found["cases"]] == [(6, "exact"), (7, "exact")]


def test_verify_takes_the_options_of_config() -> None:
    taken = inspect.signature(command.verify).parameters
    assert {field.name for field in fields(cpcompile.Config)} - set(taken) == set(command.LEFT_OUT)
    given = {name: taken[name].default for name in taken if hasattr(cpcompile.Config(), name)}
    assert {name for name, x in given.items() if x is not None and x != getattr(cpcompile.Config(), name)} == set()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("my_factory:with_inputs", "--length", "6"), "--length 6: my_factory:with_inputs returns inputs of its own"),
        (("my_factory:with_inputs", "--token-dim", "input"), "--token-dims input: give it as name=value"),
        (("my_factory:with_inputs", "--dtype", "int8"), "--dtype int8: choose one of float64"),
        (("my_factory:fails",), "RuntimeError: no weights"),
    ],
)
def test_verify_refuses(factory: None, given: tuple[str, ...], message: str) -> None:
    result = invoke("verify", *given)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.slow
def test_needs_torch_only(factory: None, tmp_path: Path) -> None:
    """A folder with torch, rich and typer and what these need is all that commands find."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    packages = tmp_path / "packages"
    packages.mkdir()
    for top in {path for name in required("torch", "rich", "typer") for path in top_levels(name)}:
        (packages / top.name).symlink_to(top)
    root = Path(cpcompile.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{packages}:{root}"}

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-S", "-m", "cpcompile", *given]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    found = run("verify", "my_factory:of_length", "--world-size", "2")
    assert found.returncode == 0, found.stderr
    assert run("explain", "my_factory:of_length").returncode == 0
    found = run("verify", "llama")
    assert (found.returncode, "pip install 'cpcompile[train]'" in found.stderr) == (2, True)


def required(*names: str) -> set[str]:
    """Return distributions with all that they need."""
    found, todo = set[str](), list(names)
    while todo:
        name = re.split(r"[^\w.-]", todo.pop())[0]
        with contextlib.suppress(PackageNotFoundError):
            requires = [] if name in found else distribution(name).requires or []
            found.add(name)
            todo += [each for each in requires if "extra ==" not in each]
    return found


def top_levels(name: str) -> set[Path]:
    """Return the folders and files of a distribution."""
    files = distribution(name).files or []
    tops = {file.parts[0] for file in files} - {"..", "__pycache__"}
    return {Path(str(distribution(name).locate_file(top))) for top in tops}


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
    left_out = {
        "memory",
        "optimizer_states",
        "sync_weights",
        "check_inputs",
        "dynamic",
        "check_finite",
        "one_rank_compiles",
    }
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
    shown = "error: aten.foo cannot be sharded:\n  the user's line\nRead more: docs/diagnostics.md#norule\n"
    assert (result.exit_code, result.stderr) == (2, shown)


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
