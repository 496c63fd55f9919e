"""The log: a half-written line is passed over with a word, and an error of the disk is one of the log."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cpcompile.errors import StorageError
from cpcompile.train.events import Resumed, Step
from cpcompile.train.report import Reporter, append_log, keep_log
from tests.train_support import tiny_options


def step(number: int) -> Step:
    return Step(number, 2.0, 1.0, 0.1, 10.0, 100)


def steps_in(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def test_steps_after_the_checkpoint_are_taken_again(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert keep_log(log, 3) == []
    for number in (1, 2, 3):
        append_log(log, step(number))
    assert keep_log(log, 2) == []
    assert steps_in(log) == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b"\xff\x00\x00", b"[]", b'{"step": "3"}', b""])
def test_a_half_written_line_is_left_out_with_a_word(tmp_path: Path, half: bytes) -> None:
    options = tiny_options(tmp_path, log=tmp_path / "log.jsonl", resume=True)
    log = tmp_path / "log.jsonl"
    append_log(log, step(1))
    with log.open("ab") as file:
        file.write(half or b"\n")
    console = Console(width=200, file=io.StringIO())
    with Reporter(options, console) as report:
        report(Resumed(1))
        report(step(2))
    assert "log.jsonl: line 2 is no whole record, left out: b" in console.file.getvalue()
    assert steps_in(log) == [1, 2]


def test_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(StorageError, match=r"(?m)^--log /dev/full cannot be written: No space left on device\.$"):
        append_log(Path("/dev/full"), step(1))


def test_a_log_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> int:
        raise PermissionError(13, "Permission denied")

    options = tiny_options(tmp_path, log=tmp_path / "log.jsonl")
    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(StorageError, match=r"log\.jsonl cannot be written: Permission denied"):
        Reporter(options, Console(quiet=True)).__enter__()
