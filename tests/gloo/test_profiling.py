"""In profiles of a running job, each attention is a range that says how it is computed and of which layer it is."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import cpcompile
from cpcompile.inspect.profile import read_profile
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
    return [event.name for event in profile.events() if event.name.startswith("cpcompile.")]


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
