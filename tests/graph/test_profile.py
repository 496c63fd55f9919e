"""Attentions are ranges of a profile, and a trace says where the time of a step went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.compile.attention_layers import name_layers
from cpcompile.compile.outline_layers import outline_layers
from cpcompile.errors import ConfigError
from cpcompile.inspect.profile import PARTS, read_profile
from cpcompile.inspect.spans import clip, minus, union
from cpcompile.ir.operator_call import Call
from cpcompile.runtime.attention.profiling import AttentionRange
from tests.graph.small_models import planned

cp = torch.ops.cpcompile
AXIS = {"length": 8, "layout": "zig_zag", "world_size": 1, "group": ""}
TERMS = (None, None, None, 1.0, True, 0, 0.0)


def run_attentions() -> None:
    """Run an attention of a ring of one rank, and one that exchanges nothing, both ways."""
    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    out = cp.ring_attention(q, k, v, *TERMS, **AXIS, layer="layers.3.mixer")[0]
    (out.sum() + cp.attention(q, k, v, *TERMS, layer="layers.{0..3}.cross").sum()).backward()


def test_each_attention_is_a_range() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run_attentions()
    names = [event.name for event in profile.events() if event.name.startswith("cpcompile.")]
    ranges = ["cpcompile.ring zig_zag layers.3.mixer", "cpcompile.local whole layers.{0..3}.cross"]
    assert sorted(names) == sorted([*ranges, *(f"{name} backward" for name in ranges)])
    assert all(str(AttentionRange.of(name)) == name for name in names)


def test_nothing_is_recorded_where_no_profiler_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail(name))
    run_attentions()


class Block(nn.Module):
    """A layer of attention that is long enough to be outlined."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Four equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(16, 8), nn.ModuleList(Block() for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_layers_that_are_compiled_once_share_a_range() -> None:
    graph = planned(Stack(), {"input_ids": torch.zeros(1, 12, dtype=torch.int64)}).graph
    name_layers(graph)
    of_layers = [Call.of(node)["layer"] for node in graph.graph.nodes if "_attention" in str(node.target)]
    assert of_layers == [f"blocks.{i}" for i in range(4)]
    assert outline_layers(graph) == 4
    (body,) = (module for module in graph.children() if isinstance(module, torch.fx.GraphModule))
    assert [node.kwargs["layer"] for node in body.graph.nodes if "layer" in node.kwargs] == ["blocks.{0..3}"]


def event(category: str, name: str, start: float, length: float, **more: Any) -> dict[str, Any]:
    """Return an event as the profiler writes it; times in microseconds."""
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": 1, "args": {}} | more


def kernel(name: str, number: int, start: float, length: float, stream: int, launched: float) -> list[dict[str, Any]]:
    """Return a kernel and what launched it."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", launched, 1, args={"correlation": number}),
        event("kernel", name, start, length, args={"correlation": number, "stream": stream}),
    ]


RING = "cpcompile.ring zig_zag model.layers.0.attn"
TWO_STEPS = [
    event("user_annotation", "ProfilerStep#1", 0, 100),
    event("user_annotation", "ProfilerStep#2", 100, 90),
    event("user_annotation", RING, 10, 20),
    event("user_annotation", f"{RING} backward", 30, 10, tid=2),
    *kernel("flash", 1, 20, 20, 7, launched=11),
    *kernel("ncclDevKernel_SendRecv", 2, 35, 15, 20, launched=12),  # beside attention for 5, and 10 exposed
    *kernel("gemm", 3, 60, 10, 7, launched=50),
    *kernel("gemm", 4, 65, 25, 9, launched=32),  # of another thread than that of backward
    *kernel("flash_backward", 5, 150, 50, 7, launched=33) ,
]  # fmt: skip
TWO_STEPS[-2]["tid"] = 2


def write(path: Path, events: list[dict[str, Any]], rank: int) -> Path:
    text = json.dumps({"distributedInfo": {"rank": rank}, "traceEvents": events}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_each_moment_of_a_step_is_told(tmp_path: Path) -> None:
    paths = [write(tmp_path / "b.json.gz", TWO_STEPS, 1), write(tmp_path / "a.json", TWO_STEPS, 0)]
    first, second = read_profile(paths)
    assert (first.rank, second.rank, first.device, first.num_steps) == (0, 1, "cuda", 2)
    times = {name: getattr(first, name) * 2e6 for name in (*PARTS, "overlapped")}
    # The device runs dry twice: the kernel that ends the first gap is launched then, that of the second was long before.
    of_gaps = {"host_gaps": 20 + 10, "device_gaps": 60}
    expected = {"step": 200, "attention": 70, "other": 30, "exposed": 10, "overlapped": 5, **of_gaps}
    assert times == pytest.approx(expected)
    forward, backward = first.attentions
    assert (forward.layer, forward.strategy, forward.layout, forward.calls) == (
        "model.layers.0.attn",
        "ring",
        "zig_zag",
        0.5,
    )
    assert (forward.kernels, forward.transfers, forward.exposed) == pytest.approx((10e-6, 7.5e-6, 5e-6))
    assert (backward.direction, backward.kernels, backward.transfers) == ("backward", pytest.approx(25e-6), 0)


def test_command(tmp_path: Path) -> None:
    paths = [str(write(tmp_path / f"{rank}.json", TWO_STEPS, rank)) for rank in range(2)]
    result = CliRunner().invoke(app, ["explain-profile", *paths])
    assert result.exit_code == 0, result.output
    lines = "\n".join(" ".join(line.split()) for line in result.output.splitlines())
    assert "\n1 100 us 35 us 35% 15 us 15% 5 us 5% 15 us 15% 30 us 30% 2.5 us " in lines, lines
    assert "\nflash_backward 0.5 25 us\ngemm 1 15 us\n" in lines
    assert "\nmodel.layers.0.attn ring zig_zag backward 0.5 25 us 0 us 0 us" in lines
    found = json.loads(CliRunner().invoke(app, ["explain-profile", "--json", *paths]).output)
    assert [rank["attentions"][0]["kernels"] for rank in found["ranks"]] == pytest.approx([10e-6] * 2)


def test_traces_are_compared(tmp_path: Path) -> None:
    """Before, nothing was sent, the attention of forward was a gathered one, and a kernel was there that is gone."""
    before = [each | {"name": each["name"].replace("ring", "gather")} for each in TWO_STEPS]
    before = [each for each in before if not each["name"].startswith("nccl")]
    before += kernel("copies", 6, 92, 4, 7, launched=91)
    paths = [str(write(tmp_path / f"{name}.json", events, 0)) for name, events in {"a": TWO_STEPS, "b": before}.items()]
    result = CliRunner().invoke(app, ["explain-profile", paths[0], "--against", paths[1]])
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "exposed transfers 0 us 5 us +5 us" in lines
    assert "other kernels 17 us 15 us -2 us" in lines
    assert "model.layers.0.attn forward gather zig_zag ring zig_zag +0 us +7.5 us +5 us" in lines
    assert "ncclDevKernel_SendRecv 0 -> 0.5 0 us 7.5 us +7.5 us" in lines
    assert "copies 0.5 -> 0 2 us 0 us -2 us" in lines
    assert not any(line.startswith("gemm 1 ->") for line in lines)
    arguments = ["explain-profile", "--json", paths[0], "--against", paths[1]]
    assert len(json.loads(CliRunner().invoke(app, arguments).output)["against"]) == 1


def test_a_trace_without_our_ranges_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "other.json", [each for each in TWO_STEPS if not each["name"].startswith("cpcompile.")], 0)
    with pytest.raises(ConfigError, match="has no range of an attention"):
        read_profile([path])
    result = CliRunner().invoke(app, ["explain-profile", str(path)])
    assert result.exit_code == 2
    assert "error: " in result.output


def test_differences_of_spans() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        starts = torch.randint(0, 30, (2, 6), generator=generator).tolist()
        lengths = torch.randint(1, 6, (2, 6), generator=generator).tolist()
        of = [union((s, s + n) for s, n in zip(*each, strict=True)) for each in zip(starts, lengths, strict=True)]
        cells = [{i for s, e in spans for i in range(int(s), int(e))} for spans in of]
        assert {i for s, e in minus(*of) for i in range(int(s), int(e))} == cells[0] - cells[1]
        assert {i for s, e in clip(of[0], (5, 20)) for i in range(int(s), int(e))} == cells[0] & set(range(5, 20))
