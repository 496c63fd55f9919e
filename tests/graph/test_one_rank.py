"""benchmarks/one_rank.py: one rank of a job that does not exist computes what a rank of a real one does, on real numbers."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cpcompile.runtime import kernels
from cpcompile.runtime.attention import key_needs, partial_results
from cpcompile.runtime.transport import choice as transport


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which lies beside other benchmarks."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import one_rank

    yield one_rank
    own = ("attention_", "scaling_", "one_rank", "lone_rank", "host_time")
    for name in [name for name in sys.modules if name.startswith(own)]:
        del sys.modules[name]


PLANS = ["ring/zig_zag", "ring/balanced", "gather/balanced", "ulysses/contiguous", "usp 2x2/balanced"]


@pytest.mark.parametrize("plan", PLANS)
def test_a_rank_alone_computes_finite_numbers_from_memory_of_its_own(
    one_rank: ModuleType, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lone_rank

    slots = []

    class Watched(lone_rank.Memory):
        def __init__(self, num_bytes: int, device: torch.device) -> None:
            super().__init__(num_bytes, device)
            slots.append(self.of(1).clone())

    monkeypatch.setattr(lone_rank, "Memory", Watched)
    options = one_rank.parsed(["--device", "cpu", "--scale", "256"])
    case = one_rank.case_of("packed_64k_random_16", 4)
    system = one_rank.our_system(*plan.split("/"), "auto")
    with (
        one_rank.rank_of(case, 4, 2, options) as problem,
        one_rank.opened(problem, system) as (runner, sets),
    ):
        saved, grads = one_rank.step(runner, sets[0])
        tensors = runner.tensors(saved, grads)
    assert slots
    for dtype in (torch.bfloat16, torch.float32):
        assert all(x.view(dtype).isfinite().all() and x.view(dtype).abs().sum() > 0 for x in slots)
    assert [tuple(x.shape) for x in tensors.values()] == [(1, 64, heads, 128) for heads in (32, 32, 8, 8)]
    assert all(x.isfinite().all() and x.abs().sum() > 0 for x in tensors.values())
    assert not torch.distributed.is_initialized()
    assert not transport._chosen


def test_rows_are_written_with_limits_and_predictions(one_rank: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    chosen = ["--cases", "window_4k_of_64k", "--ranks", "4", "--strategies", "halo/contiguous", "ulysses"]
    one_rank.main([*chosen, "--device", "cpu", "--scale", "256", "--repeats", "1", "--out", str(path)])
    found = json.loads(path.read_text())
    assert [row["kernel"] for row in found["limits"]] == ["cpu"]
    assert [list(row["per_rank"]) for row in found["rows"]] == [["0", "2", "3"], ["0"]]
    for row in found["rows"]:
        totals = {int(rank): x["total_ms"] for rank, x in row["per_rank"].items()}
        assert row["total_ms"] == max(totals.values()) == totals[row["slowest_rank"]]
        assert row["limit_ms"] == pytest.approx(found["limits"][0]["total_ms"] / 4, abs=1e-4)
        assert row["percent_of_limit"] == pytest.approx(100 * row["limit_ms"] / row["total_ms"], rel=1e-2)
        assert 0 < row["predicted_compute_ms"] < row["predicted_ms"]
    assert found["left_out"] == []


def test_what_the_budget_leaves_out_is_named(one_rank: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    one_rank.main(["--cases", "causal_64k", "--ranks", "2", "--device", "cpu", "--budget", "0", "--out", str(path)])
    found = json.loads(path.read_text())
    names = [f"causal_64k/2/{plan}" for plan in ("ring/zig_zag", "ulysses/contiguous", "gather/zig_zag")]
    assert (found["rows"], found["left_out"]) == ([], names)


def test_a_failure_ends_no_other_row(one_rank: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    chosen = ["--cases", "causal_64k", "--ranks", "2", "--strategies", "ring", "gather", "--kernel", "cudnn"]
    one_rank.main([*chosen, "--device", "cpu", "--scale", "512", "--repeats", "1", "--out", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 2 and all("KernelError" in row["failure"] for row in rows)


def test_which_rows_and_ranks(one_rank: ModuleType) -> None:
    items = one_rank.items_of(one_rank.CASES, (2, 4, 8), ())
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    # 8k a GPU on 8 of them is 64k.
    assert "causal_64k/4/ring/zig_zag" in names and "causal_64k/8/ring/zig_zag" not in names
    ranks = {item.name: item.measured_ranks("few") for item in items}
    assert ranks["packed_64k_random_16/8/ring/balanced"] == list(range(8))
    assert ranks["packed_64k_random_16/8/usp 2x4/balanced:4"] == [0, 4]
    assert ranks["causal_128k/8/ring/zig_zag"] == [0, 4, 7]
    assert ranks["causal_128k/8/usp 4x2/zig_zag"] == [0, 4, 6]
    assert ranks["causal_128k/8/ulysses/contiguous"] == [0]
    assert all(item.measured_ranks("all") == list(range(item.ranks)) for item in items)


def test_the_default_run_is_short_by_estimate(one_rank: ModuleType) -> None:
    run = one_rank.Run(
        one_rank.parsed(["--budget", "0", "--device", "cpu"]), one_rank.items_of(one_rank.CASES, (2, 4, 8), ())
    )
    run.run()
    assert 60 < run.estimate < 200


def test_profile_prints_a_table(one_rank: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    one_rank.main(["--device", "cpu", "--scale", "512", "--profile", "causal_64k/2/ring/zig_zag/1"])
    text = capsys.readouterr().out
    assert "Self CPU" in text and "cpcompile::ring_attention_backward" in text


def test_host_time_counts(one_rank: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import host_time

    for module, name in (
        (kernels, "KERNELS"),
        (partial_results, "merge_"),
        (partial_results, "add_"),
        (key_needs, "GAP"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    kernels.choose.cache_clear(), kernels.known_calls.cache_clear()
    host_time.without_devices()
    try:
        row = host_time.measure(host_time.Setting("ring", 2), 0, 1)
    finally:
        kernels.choose.cache_clear(), kernels.known_calls.cache_clear()
    assert (row.kernel_calls, row.merges, row.copies, row.beside) == (4, 4, 12, 3)
