"""In profiles of a running job, each attention and each layer is a range, and steps that are profiled compute the same."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cpcompile
from cpcompile.inspect.profile import read_profile
from cpcompile.runtime.attention.profiling import AttentionRange
from cpcompile.runtime.layer_ranges import LayerRange
from tests.models import batch, loss_of, make


def profiled(rank: Any, folder: str) -> list[str]:
    """Run a step in a profiler, write its trace into `folder`, and return the names of its ranges."""
    torch._dynamo.reset()
    model = make("llama", num_layers=2)
    data = batch(model, 24)
    cpcompile.apply(model, rank.mesh(), inner="aot_eager", strategy="ring", balancer="zig_zag")
    loss_of(model(**data)).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss_of(model(**data)).backward()
    profile.export_chrome_trace(str(Path(folder) / f"rank{rank.rank}.json.gz"))
    return [event.name for event in profile.events() if AttentionRange.of(event.name)]


def test_each_attention_is_a_range(pool: Any, tmp_path: Path) -> None:
    ranges = [f"cpcompile.ring zig_zag model.layers.{i}.self_attn{of}" for i in range(2) for of in ("", " backward")]
    for found in pool.run(2, profiled, str(tmp_path)):
        assert Counter(found) == Counter(ranges)
    for number, rank in enumerate(read_profile(sorted(tmp_path.iterdir()))):
        assert (rank.rank, rank.device, rank.num_steps, len(rank.attentions)) == (number, "cpu", 1, 4)
        assert rank.step == pytest.approx(rank.attention + rank.other + rank.exposed + rank.host_gaps)
        assert min(rank.attention, rank.other, rank.exposed, rank.host_gaps) > 0
        assert rank.attention == pytest.approx(sum(each.kernels for each in rank.attentions))
        for each in rank.attentions:
            assert each.calls == 1
            assert 0 < each.exposed <= each.transfers


LAYERS = 4  # as many as are compiled once


class Block(nn.Module):
    """A layer of attention and a product, long enough to become a call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Equal layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).square().mean()


def layers_profiled(rank: Any, folder: str, options: dict[str, Any]) -> tuple[list[tuple[str, float, float]], bool]:
    """Run the same step without and with a profiler: the ranges of the second, and whether both computed the same bits."""
    torch._dynamo.reset()
    model = Stack()
    ids = torch.arange(24).reshape(2, 12) % 16
    cpcompile.apply(model, rank.mesh(), strategy="ring", balancer="zig_zag", **options)
    found = []
    path = Path(folder) / f"rank{rank.rank}.json"
    model(input_ids=ids).backward()  # compiles
    for is_profiled in (False, True):
        model.zero_grad()
        profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        with profile if is_profiled else contextlib.nullcontext():
            loss = model(input_ids=ids)
            loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    ours = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("cpcompile.")]
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in sorted(ours, key=lambda e: e["ts"])]
    return spans, all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def check_ranges(spans: list[tuple[str, float, float]]) -> None:
    """Check that each layer and each attention has a range both ways, and each attention lies in its layer's."""
    layers = [(found, *span) for name, *span in spans if (found := LayerRange.of(name))]
    blocks = [f"blocks.{i}" for i in range(LAYERS)]
    forward = list(dict.fromkeys(x.layer for x, *_ in layers if not x.is_backward))
    backward = list(dict.fromkeys(x.layer for x, *_ in layers if x.is_backward))
    assert [x for x in forward if x in blocks] == blocks
    assert [x for x in backward if x in blocks] == blocks[::-1]
    assert "head" in {*forward} & {*backward}
    for (_, _, end), (_, start, _) in itertools.pairwise(layers):
        assert end <= start
    attentions = [(name, *span) for name, *span in spans if name.startswith("cpcompile.ring")]
    expected = [f"cpcompile.ring zig_zag {block}" for block in blocks]
    assert Counter(name for name, *_ in attentions) == Counter([*expected, *(f"{each} backward" for each in expected)])
    for name, start, end in attentions:
        _, _, layer, *direction = name.split()
        assert any(
            str(x) == " ".join(["cpcompile.layer", layer, *direction]) and s <= start and end <= e for x, s, e in layers
        )


def check_profile(folder: Path) -> None:
    """Check that the time of a step is told by layer."""
    for rank in read_profile(sorted(folder.iterdir())):
        of_blocks = {(x.layer, x.direction): x for x in rank.layers if x.layer.startswith("blocks.")}
        assert set(of_blocks) == {(f"blocks.{i}", way) for i in range(LAYERS) for way in ("forward", "backward")}
        attentions = {(x.layer, x.direction): x.kernels for x in rank.attentions}
        assert all(0 < attentions[key] < layer.kernels < rank.step for key, layer in of_blocks.items())


def test_each_layer_is_a_range_operator_by_operator(pool: Any, tmp_path: Path) -> None:
    for spans, is_equal in pool.run(2, layers_profiled, str(tmp_path), {"inner": "eager"}):
        assert is_equal
        check_ranges(spans)
    check_profile(tmp_path)


def test_each_layer_is_a_range_of_both_graphs(pool: Any, tmp_path: Path) -> None:
    for spans, is_equal in pool.run(2, layers_profiled, str(tmp_path), {"inner": "aot_eager"}):
        assert is_equal
        check_ranges(spans)
    check_profile(tmp_path)


def test_layers_that_are_compiled_once_are_told_apart(pool: Any, tmp_path: Path) -> None:
    ((spans, is_equal),) = pool.run(1, layers_profiled, str(tmp_path), {"inner": "inductor"}, timeout=250)
    assert is_equal
    check_ranges(spans)
    check_profile(tmp_path)


@pytest.mark.slow
def test_each_layer_is_a_range_where_each_is_compiled_by_itself(pool: Any, tmp_path: Path) -> None:
    options = {"inner": "inductor", "outline_layers": False}
    ((spans, is_equal),) = pool.run(1, layers_profiled, str(tmp_path), options, timeout=250)
    assert is_equal
    check_ranges(spans)
    check_profile(tmp_path)
