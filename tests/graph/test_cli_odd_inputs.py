"""The command line with odd targets, sizes and files: a message that says what to do, and the exit code of the help."""

import contextlib
import io
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer

import cpcompile
from cpcompile.commands.guard import guard
from cpcompile.inspect import sweep
from tests.graph.test_cli import invoke

FACTORY = """
import torch

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids))

def of_length(length):
    return Model(), {"input_ids": torch.arange(length)[None] % 7}

def of_own_size():
    return of_length(4)

def ends():
    raise SystemExit(3)

def three():
    return *of_length(4), 1

def swapped():
    return of_length(4)[::-1]

def function():
    return print, {"x": torch.zeros(1)}

class Loud(Model):
    def forward(self, input_ids):
        print("loud")
        return super().forward(input_ids)

def loud(length):
    print("made")
    return Loud(), of_length(length)[1]
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_factory.py").write_text(FACTORY)
    (tmp_path / "broken_factory.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `explain` is given, which explains nothing."""
    given: list[Any] = []
    monkeypatch.setattr(
        cpcompile, "explain", lambda model, inputs, **options: given.append((model, inputs)) or "a plan", raising=False
    )
    return given


@pytest.mark.parametrize("command", ["explain", "verify", "diff"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("", "'': neither a model folder nor module:factory."),
        (":of_length", "neither a model folder nor module:factory."),
        ("odd_factory:of_lenght", "Did you mean 'of_length'?"),
        ("odd_factory:key:", "odd_factory:key:: odd_factory has no function"),  # no picture of a key
        ("odd_factory:ends", "SystemExit: 3"),
        ("odd_factory:three", "odd_factory:three returns (Model, dict, int): let it return a torch.nn.Module"),
        ("odd_factory:swapped", "returns (dict, Model)"),
        ("odd_factory:function", "returns (builtin_function_or_method, dict)"),
        ("broken_factory:f", "SyntaxError"),
    ],
)
def test_targets_of_nonsense(factory: None, command: str, target: str, message: str) -> None:
    result = invoke(command, target)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert "target.py" not in result.stderr  # the user's frames alone


@pytest.mark.parametrize("command", ["explain", "verify", "diff"])
@pytest.mark.parametrize(("option", "name"), [("--length", "length"), ("--batch-size", "batch_size")])
def test_sizes_that_a_factory_does_not_take(factory: None, command: str, option: str, name: str) -> None:
    result = invoke(command, "odd_factory:of_own_size", option, "6")
    assert result.exit_code == 2
    assert f"{option} 6: odd_factory:of_own_size returns inputs of its own" in result.stderr
    assert f"def factory({name})" in result.stderr


def test_json_is_all_of_stdout(factory: None) -> None:
    result = invoke("verify", "odd_factory:loud", "--json")
    assert json.loads(result.stdout)["cases"][0]["verdict"] == "refused"
    assert "made" in result.stderr


def test_a_minifier_that_finds_nothing_leaves_the_verdict(factory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sweep.Sweep((sweep.Case(world_size=2, tokens=4, verdict="WRONG", text="the report"),))
    monkeypatch.setattr(sweep, "verify_sweep", lambda model, inputs, **given: found)
    result = invoke("verify", "odd_factory:of_length", "--length", "6", "--minify", "small.py")
    assert (result.exit_code, "--minify small.py: nothing is WRONG" in result.stderr) == (1, True)


def test_a_minifier_without_work_says_so(factory: None) -> None:
    result = invoke("verify", "odd_factory:of_length", "--length", "6", "--minify", "small.py")
    assert (result.exit_code, "small.py: not written" in result.stderr) == (0, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("explain", "--html", "folder.html"), "this is a folder"),
        (("verify", "--minify", "nowhere/small.py"), "the folder nowhere does not exist"),
        (("verify", "--minify", "small.txt"), "is one of .py"),
        (("verify", "--device", "cpu"), "--device cpu: this is for the processes of --real"),
        (("verify", "--device", "tpu"), "'cuda'"),
        (("explain", "--device", "odd_factory.py"), "device='odd_factory.py': this is no machine"),
    ],
)
def test_files_and_devices_of_nonsense(factory: None, given: tuple[str, str, str], message: str) -> None:
    Path("folder.html").mkdir()
    command, *option = given
    result = invoke(command, "odd_factory:of_length", *option)
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_a_folder_that_nobody_may_write_to(factory: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *given: False)
    result = invoke("explain", "odd_factory:of_length", "--html", "plan.html")
    assert (result.exit_code, "you may not write there" in result.stderr) == (2, True)


def test_a_model_of_a_factory_is_explained_for_gpus(factory: None, seen: list[Any]) -> None:
    assert invoke("explain", "odd_factory:of_length", "--device", "h100").exit_code == 0
    assert invoke("explain", "odd_factory:of_length").exit_code == 0
    for (model, inputs), device in zip(seen, ("meta", "cpu"), strict=True):
        assert {x.device.type for x in (*model.parameters(), *inputs.values())} == {device}


def test_warnings_have_no_line_of_ours() -> None:
    def run() -> None:
        warnings.warn_explicit("look here", UserWarning, "model.py", 3)
        warnings.warn_explicit("and here", UserWarning, f"{Path(cpcompile.__file__).parent}/x.py", 3)

    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *given, **more: printed.write(warnings.formatwarning(*given[:4]))
        guard(run)
    assert printed.getvalue().splitlines() == ["model.py:3: UserWarning: look here", "warning: and here"]


def test_a_closed_pipe_is_no_verdict() -> None:
    def run() -> None:
        raise BrokenPipeError

    with pytest.raises(typer.Exit) as end:
        guard(run)
    assert end.value.exit_code == 141


@pytest.mark.parametrize(
    ("given", "meant"), [("profile", "explain-profile"), ("explian", "explain"), ("trian", "train")]
)
def test_commands_that_are_misspelled(given: str, meant: str) -> None:
    result = invoke(given, "x")
    assert (result.exit_code, f"Did you mean {meant!r}?" in result.stderr) == (2, True)
