"""Plots: pictures by suffix, the terminal's, and errors that say what to pass."""

from __future__ import annotations

import builtins
import gzip
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console
from typer.testing import CliRunner

import cpcompile
from cpcompile import ConfigError
from cpcompile.cli import app
from cpcompile.commands.plot import bounds_of
from cpcompile.inspect.masks import matrices
from cpcompile.inspect.plots.balance import work_by_balancer
from cpcompile.inspect.trace import read_lanes
from cpcompile.inspect.visualize import Picture
from tests.graph.small_models import TinyLM, batch

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PNG = b"\x89PNG\r\n"


def plot(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plot", *arguments])


def printed(matrix: Any, world_size: int) -> list[str]:
    console = Console(file=io.StringIO(), width=120)
    console.print(Picture(matrix, world_size))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(
    "mask",
    [["causal"], ["window", "--window", "9"], ["packed", "--documents", "30,20,14"], ["joint", "--parts", "16,48"]],
)
def test_mask_as_svg(tmp_path: Path, mask: list[str]) -> None:
    out = tmp_path / "mask.svg"
    result = plot("mask", *mask, "--out", str(out), "--layout", "zig_zag", "--layout", "balanced")
    assert result.exit_code == 0, result.output
    ranks = {
        each.attrib["id"] for each in ElementTree.parse(out).iter() if each.attrib.get("id", "").startswith("rank")
    }
    assert ranks == {f"rank {rank}" for rank in range(4)}


def test_mask_as_png(tmp_path: Path) -> None:
    assert plot("mask", "--out", str(tmp_path / "mask.png")).exit_code == 0
    assert (tmp_path / "mask.png").read_bytes().startswith(PNG)


def test_terminal_is_the_picture_of_the_balancers() -> None:
    (matrix,) = matrices("causal", length=8, world_size=2, layouts=["zig_zag"])
    head, *lines = printed(matrix, 2)
    assert head == "zig_zag: 8 tokens on 2 ranks"
    ranks = "00111100"  # as the docstring of `balance.balancers.ZigZag` draws it
    assert [line.split() for line in lines[:8]] == [[ranks[i]] * (i + 1) + ["·"] * (7 - i) for i in range(8)]
    assert [line.split()[-2:] for line in lines[8:]] == [["18", "pairs"]] * 2


def test_terminal_joins_tokens_of_long_sequences() -> None:
    (matrix,) = matrices("causal", length=128, world_size=16, layouts=["contiguous"])
    head, *lines = printed(matrix, 16)
    assert head.endswith("4 tokens a cell")
    assert len(lines) == 32 + 16
    assert lines[31].split() == ["15"] * 32


def test_without_a_file_the_terminal_shows_it() -> None:
    result = plot("mask", "packed", "--documents", "5,3", "--world-size", "2", "--layout", "balanced")
    assert result.exit_code == 0
    assert result.output.startswith("balanced: 8 tokens on 2 ranks")


def test_visualize(capsys: pytest.CaptureFixture[str]) -> None:
    cpcompile.visualize(length=8, world_size=2, balancer="contiguous")
    assert capsys.readouterr().out.startswith("contiguous: 8 tokens on 2 ranks")
    plan = cpcompile.explain(TinyLM(), batch(8), world_size=2, strategy="ulysses")
    plan.visualize()
    shown = capsys.readouterr().out
    assert shown.count("causal, ulysses") == 2  # a share of the heads each
    assert "heads 1 to 1: 8 tokens on 2 ranks" in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": "round"}, "mask='round': expected one of causal, window, packed, joint"),
        ({"balancer": "striped"}, "no layout is named 'striped'"),
        ({"mask": "window"}, "the mask window needs window, a number of keys"),
        ({"window": 4}, "window, a number of keys are of the mask window"),
        ({"mask": "packed", "documents": [4, 5]}, "have 9 tokens, the sequence 8"),
        ({"world_size": 9}, "8 tokens on 9 ranks"),
    ],
)
def test_wrong_masks(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        cpcompile.visualize(**{"length": 8, "world_size": 2} | given)
    assert message in str(error.value)


def test_wrong_files(tmp_path: Path) -> None:
    result = plot("mask", "--out", str(tmp_path / "mask.pdf"))
    assert (result.exit_code, "one of .png, .svg" in result.stderr) == (2, True)
    (tmp_path / "no.json").write_text("[]")
    for command, message in (("scaling", "is no result of benchmarks/scaling.py"), ("timeline", "has no traceEvents")):
        result = plot(command, str(tmp_path / "no.json"), "--out", str(tmp_path / "x.png"))
        assert (result.exit_code, message in result.stderr) == (2, True)
    result = plot("mask", "packed", "--documents", "3,x")
    assert (result.exit_code, "--documents 3,x: expected numbers" in result.stderr) == (2, True)


def test_a_picture_says_where_it_is_and_what_keeps_it_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "mask.svg"
    result = plot("mask", "--out", str(out))
    assert (result.exit_code, result.stdout) == (0, f"written to {out}\n")

    def full(*given: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    result = plot("mask", "--out", str(out))
    assert (result.exit_code, "cannot be written: No space left on device" in result.stderr) == (2, True)


@pytest.mark.parametrize(("columns", "world_size"), [(60, 4), (80, 12), (24, 128)])
def test_a_picture_is_no_wider_than_its_terminal(columns: int, world_size: int) -> None:
    (matrix,) = matrices("causal", length=256, world_size=world_size, layouts=["zig_zag"])
    console = Console(file=io.StringIO(), width=columns)
    console.print(Picture(matrix, world_size))
    assert isinstance(console.file, io.StringIO)
    _, *lines = console.file.getvalue().splitlines()
    cells = columns // (len(str(world_size - 1)) + 1)
    rows = [line for line in lines if line.startswith((" ", *"0123456789"))]
    assert {len(row.split()) for row in rows if "tokens" not in row} == {min(32, cells)}
    assert max(map(len, lines)) <= columns


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: Any, **given: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *rest, **given)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = plot("mask", "--out", str(tmp_path / "mask.png"))
    assert (result.exit_code, "pip install cpcompile[plot]" in result.stderr) == (2, True)


def test_balance(tmp_path: Path) -> None:
    work = work_by_balancer(8, 2, [0, 8])
    assert (work["contiguous"], work["zig_zag"], work["ulysses"]) == ([10, 26], [18, 18], [18, 18])
    assert bounds_of("3,5", None) == bounds_of("3,5", 8) == [0, 3, 8]
    for documents, length, message in (("3,5", 99, "are 8 tokens, and --length is 99"), ("", None, "are 0 tokens")):
        with pytest.raises(ConfigError, match=message):
            bounds_of(documents, length)
    assert bounds_of("tiny", 2048)[-1] == 2048
    out = tmp_path / "balance.png"
    result = plot("balance", "--documents", "300,100,24", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(PNG)


def test_scaling(tmp_path: Path) -> None:
    result = json.loads((RESULTS / "scaling_h200x4.json").read_text())
    result["rows"] = [row for row in result["rows"] if row["case"] == "causal_64k"]
    (tmp_path / "result.json").write_text(json.dumps(result))
    out = tmp_path / "scaling.png"
    done = plot("scaling", str(tmp_path / "result.json"), "--out", str(out))
    assert done.exit_code == 0, done.output
    assert out.read_bytes().startswith(PNG)


def trace(rank: int, base: int) -> dict[str, Any]:
    """Return a trace as torch's profiler writes it: an attention, a transfer beside it, and what launched them."""
    events = [
        {"ph": "X", "cat": "kernel", "name": "fmha_cutlassF", "ts": 30.0, "dur": 50.0, "args": {"stream": 7}},
        {"ph": "X", "cat": "kernel", "name": "ncclDevKernel_SendRecv", "ts": 20.0, "dur": 30.0, "args": {"stream": 20}},
        {"ph": "X", "cat": "gpu_memcpy", "name": "Memcpy PtoP", "ts": 60.0, "dur": 5.0, "args": {"stream": 20}},
        {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "ts": 10.0, "dur": 4.0, "args": {}},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    return {"distributedInfo": {"rank": rank}, "baseTimeNanoseconds": base, "traceEvents": events}


def test_timeline(tmp_path: Path) -> None:
    late, early = tmp_path / "late.json.gz", tmp_path / "early.json"
    late.write_bytes(gzip.compress(json.dumps(trace(1, 10**18 + 1000)).encode()))
    early.write_text(json.dumps(trace(0, 10**18)))
    lanes = read_lanes([late, early])
    assert [(lane.rank, lane.name) for lane in lanes] == [
        (rank, name) for rank in (0, 1) for name in ("stream 7", "stream 20", "host")
    ]
    assert [[event.kind for event in lane.events] for lane in lanes[:3]] == [
        ["attention"], ["transfer", "transfer"], ["other"],
    ]  # fmt: skip
    assert lanes[3].events[0].start - lanes[0].events[0].start == pytest.approx(1e-6)
    out = tmp_path / "timeline.svg"
    result = plot("timeline", str(late), str(early), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert ElementTree.parse(out).getroot().tag.endswith("svg")
