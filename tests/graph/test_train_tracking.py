"""Trackers get the numbers of every step once; one that is not installed, or fails, is named."""

import importlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from cpcompile.errors import ConfigError, StorageError
from cpcompile.train.events import Resumed, Step
from cpcompile.train.options import validated
from cpcompile.train.report import Reporter, numbers
from tests.train_support import tiny_options

Calls = list[tuple[str, Any]]


class Writer:
    """The part of `torch.utils.tensorboard.SummaryWriter` that is used."""

    calls: Calls

    def __init__(self, folder: Path | None, purge_step: int | None) -> None:
        self.calls.append(("open", (folder, purge_step)))

    def add_text(self, name: str, text: str, step: int) -> None:
        self.calls.append(("options", text))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.calls.append((name, (value, step)))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.calls.append(("close", 0))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Put stand-ins in the place of the packages, and note what they are called with."""
    found: Calls = []

    def note(name: str) -> Any:
        return lambda *args, **given: found.append((name, (args, given)))

    for name in ("tensorboard", "wandb", "trackio"):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        for function in ("init", "log", "finish"):
            setattr(module, function, note(function))
        monkeypatch.setitem(sys.modules, name, module)
    Writer.calls = found
    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, board.__name__, board)
    return found


def step(number: int) -> Step:
    return Step(number, 2.0, 1.0, 0.1, 10.0, 100)


def report(options: Any, *events: Any) -> None:
    with Reporter(options, Console(file=io.StringIO())) as reporter:
        for event in events:
            reporter(event)


def test_tensorboard(tmp_path: Path, calls: Calls) -> None:
    options = tiny_options(tmp_path, report_to="tensorboard", save=tmp_path / "run", resume=True)
    report(options, Resumed(3), step(4))
    (opened, (_, told), *logged, closed) = calls
    assert (opened, closed) == (("open", (tmp_path / "run" / "tensorboard", 4)), ("close", 0))
    assert "learning_rate: 0.001" in told
    assert logged == [(name, (value, 4)) for name, value in numbers(step(4)).items()]


@pytest.mark.parametrize(("name", "ends"), [("wandb", [{"exit_code": 0}, {"exit_code": 1}]), ("trackio", [{}, {}])])
def test_runs_of_a_service(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str, ends: list[dict[str, int]]
) -> None:
    options = tiny_options(tmp_path, report_to=name)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "long")
    report(options, step(1))
    with pytest.raises(ZeroDivisionError), Reporter(options, Console(quiet=True)):
        raise ZeroDivisionError
    (_, (_, begun)), (_, logged), (_, (_, ended)), _, (_, (_, failed)) = calls
    assert [each for each, _ in calls] == ["init", "log", "finish", "init", "finish"]
    assert (begun["project"], begun["config"]["steps"], begun["config"]["save"]) == ("long", 4, "None")
    assert logged == ((numbers(step(1)),), {"step": 1})
    assert [ended, failed] == ends


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(
            ConfigError, match=rf"(?m)^--report-to {name} needs {name}, which .*: pip install {name}\.$"
        ):
            validated(tiny_options(tmp_path, report_to=name))
    with pytest.raises(ConfigError, match=r"--report-to mlflow is not an option: choose one of none, tensorboard"):
        validated(tiny_options(tmp_path, report_to="mlflow"))


def test_a_tracker_that_fails(tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **given: Any) -> None:
        raise TimeoutError("no answer")

    monkeypatch.setattr(sys.modules["wandb"], "log", fail)
    with pytest.raises(StorageError, match=r"(?m)^--report-to wandb failed: TimeoutError: no answer$"):
        report(tiny_options(tmp_path, report_to="wandb"), step(1))
    assert calls[-1][1][1] == {"exit_code": 1}
