"""The plan of benchmarks/scaling.py: what runs beside what, what is left out, and what the cost model says of each row."""

import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, which lies beside the benchmark."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import scaling_plan

    yield scaling_plan
    for name in [name for name in sys.modules if name.startswith(("attention_", "scaling_"))]:
        del sys.modules[name]


def jobs(plan: ModuleType, ranks: int) -> list:
    """Return an attention run and a training run."""
    train = plan.Job("train", ranks, lengths=[plan.Length(8192 * ranks, plan.ESSENTIAL)])
    return [plan.Job("attention", ranks, plan.items_of(ranks, "cuda", True)), train]


def test_ranks_that_fit_run_side_by_side(plan: ModuleType) -> None:
    found = plan.schedule({ranks: jobs(plan, ranks) for ranks in (1, 2, 4)}, 4)
    lanes = [[(lane.ranks, [job.kind for job in lane.jobs]) for lane in wave] for wave in found.waves]
    # The fourth GPU takes the training step of one.
    both = ["attention", "train"]
    assert lanes == [[(4, both)], [(2, both), (1, ["attention"]), (1, ["train"])]]


def test_the_least_important_is_left_out_until_the_rest_fits(plan: ModuleType) -> None:
    found = plan.schedule({4: jobs(plan, 4)}, 4)
    before, whole = found.seconds, len(found.waves[0][0].jobs[0].items)
    found.fit(before - 30)
    kept = found.waves[0][0].jobs[0].items
    assert found.seconds <= before - 30
    assert len(found.left_out) == whole - len(kept) > 0
    found.fit(0)
    kept = found.waves[0][0].jobs[0].items
    assert kept and {item.importance for item in kept} == {plan.ESSENTIAL}
    assert found.waves[0][0].jobs[1].lengths


def test_every_row_of_ours_has_a_prediction_and_every_case_its_limit_and_pick(plan: ModuleType) -> None:
    for ranks in (1, 2, 4, 8):
        items = plan.items_of(ranks, "cuda", True)
        own = [item for item in items if item.key.startswith("cpcompile/")]
        for item in own:
            found = plan.prediction(item.case, ranks, item.key)
            assert found["predicted_ms"] > 0
            # A ring of documents on 8 ranks waits for its host.
            assert 25 < found["predicted_percent"] < 110, (ranks, item)
        for case in plan.cases_of(ranks):
            keys = [item.key for item in items if item.case == case.name]
            assert any("/whole/" in key for key in keys)
            pick = "/".join(plan.pick_of(case, ranks))
            assert ranks == 1 or f"cpcompile/{pick}/auto" in keys


def test_grids_of_ranks(plan: ModuleType) -> None:
    assert [plan.grids(ranks) for ranks in (1, 2, 4, 8)] == [[], [], ["2x2"], ["2x4", "4x2"]]
