"""A crash while writing loses nothing, damage is noticed, and another run's checkpoint is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cpcompile.errors import InputError
from cpcompile.train import checkpoint


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"step": step, "weight": torch.full((3,), float(step))})


def test_the_newest_is_read(tmp_path: Path) -> None:
    write(tmp_path, 9, 10)
    state, path, damaged = checkpoint.load(tmp_path)
    assert (state["step"], path.name, damaged) == (10, "checkpoint-000010.pt", [])
    assert state["weight"].tolist() == [10.0] * 3


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    assert [step for step, _ in checkpoint.find(tmp_path)] == [2, 3]


def test_a_crash_while_writing_keeps_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def crash(state: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001.pt"]


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoint-000002.pt.partial").write_bytes(b"half of it")
    assert checkpoint.load(tmp_path)[0]["step"] == 1
    write(tmp_path, 3)
    assert not list(tmp_path.glob("*.partial"))


def test_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    newest = tmp_path / "checkpoint-000002.pt"
    newest.write_bytes(newest.read_bytes()[:300])
    state, _, damaged = checkpoint.load(tmp_path)
    assert (state["step"], damaged) == (1, [newest])


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000001.pt").write_bytes(b"")
    with pytest.raises(InputError, match=r"no checkpoint in .* can be read: checkpoint-000001\.pt"):
        checkpoint.load(tmp_path)


def test_another_run() -> None:
    with pytest.raises(InputError, match=r"checkpoint-000001\.pt belongs to another run: length was 64 and is 32"):
        checkpoint.check_same_job({"length": 64, "seed": 0}, {"length": 32, "seed": 0}, Path("checkpoint-000001.pt"))
