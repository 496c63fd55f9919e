"""Each stream of a device is busy or idle for a cause, and layers have the kernels that they launched."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.inspect.profile import read_profile
from tests.graph.test_profile import RING, event, kernel, write

LAYER = "cpcompile.layer model.layers.0"
# Times in microseconds; a launch takes one. Stream 7 computes, 9 too, 20 sends.
ONE_STEP = [
    event("user_annotation", "ProfilerStep#1", 0, 200),
    event("user_annotation", LAYER, 10, 25),
    event("user_annotation", RING, 12, 4),
    event("user_annotation", f"{LAYER} backward", 36, 10),
    event("gpu_user_annotation", LAYER, 20, 80, tid=7),
    *kernel("flash", 1, 20, 20, 7, launched=15),  # launched when the stream was idle
    *kernel("gemm", 2, 43, 17, 7, launched=17),  # right behind
    *kernel("gemm", 3, 90, 10, 7, launched=20),  # waits for the message on stream 20
    *kernel("gemm", 4, 130, 20, 7, launched=30),  # waits for what stream 9 computes
    *kernel("gemm", 5, 170, 10, 7, launched=40),  # waits for nothing that is in the trace
    *kernel("ncclDevKernel_SendRecv", 6, 70, 18, 20, launched=50),
    *kernel("gemm", 7, 110, 19, 9, launched=60),
]  # fmt: skip
#           busy, nothing launched, for a transfer, for another stream, between kernels, unknown
STREAMS = {
    7: (77, 20 + 20, 30, 30, 3, 20),
    9: (19, 61 + 71, 0, 0, 0, 110 - 61),
    20: (18, 51 + 112, 0, 0, 0, 70 - 51),
}


def test_idle_time_of_each_stream_has_a_cause(tmp_path: Path) -> None:
    (found,) = read_profile([write(tmp_path / "a.json", ONE_STEP, 0)])
    assert [stream.stream for stream in found.streams] == list(STREAMS)
    for stream in found.streams:
        _, *seconds = astuple(stream)
        assert [each * 1e6 for each in seconds] == pytest.approx(STREAMS[stream.stream], abs=1e-6)
        assert sum(seconds) == pytest.approx(found.step)


def test_a_kernel_without_its_launch_was_not_late(tmp_path: Path) -> None:
    """A trace of the device alone does not say what the host did, so that only what runs beside explains a gap."""
    events = [each for each in ONE_STEP if each["cat"] != "cuda_runtime"]
    (found,) = read_profile([write(tmp_path / "a.json", events, 0)])
    (seven, *_) = found.streams
    assert (seven.host * 1e6, seven.transfers * 1e6) == pytest.approx((20, 30))  # nothing runs any more at the end


def test_layers_have_the_kernels_that_they_launched(tmp_path: Path) -> None:
    (found,) = read_profile([write(tmp_path / "a.json", ONE_STEP, 0)])
    forward, backward = found.layers
    assert (forward.layer, forward.direction, backward.direction) == ("model.layers.0", "forward", "backward")
    assert (forward.kernels * 1e6, backward.kernels * 1e6) == pytest.approx((20 + 17 + 10 + 20, 10))
    assert (forward.transfers, backward.transfers) == (0, 0)


def test_streams_and_layers_are_printed_and_compared(tmp_path: Path) -> None:
    """Before, the message was not there, and nothing waited for it."""
    before = [each for each in ONE_STEP if each["args"].get("correlation") != 6]
    paths = [str(write(tmp_path / f"{name}.json", each, 0)) for name, each in {"a": ONE_STEP, "b": before}.items()]
    result = CliRunner().invoke(app, ["explain-profile", paths[0], "--against", paths[1]])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "7 77 us 40 us 30 us 30 us 3 us 20 us" in lines
    assert "model.layers.0 forward 67 us 0 us 0 us" in lines
    assert "7 +0 us +0 us +30 us +0 us +0 us -30 us" in lines
    assert "20 +18 us +163 us +0 us +0 us +0 us +19 us" in lines
    assert "model.layers.0 forward 67 us 67 us +0 us +0 us +0 us" in lines
    output = CliRunner().invoke(app, ["explain-profile", "--json", paths[0], "--against", paths[1]]).output
    told = json.loads(output)
    assert told["ranks"][0]["streams"][0]["transfers"] == pytest.approx(30e-6)
    assert told["against"][0]["streams"][0]["transfers"] == 0
    assert told["ranks"][0]["layers"][0]["kernels"] == pytest.approx(67e-6)
