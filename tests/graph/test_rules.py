"""Every rule is proven by execution: whole, and by every rank on its own tokens."""

from __future__ import annotations

import zlib

import pytest
import torch

from tests.graph.rule_cases import CASES, all_targets, cases_of, settings
from tests.graph.rule_checker import Setting, check_case

aten = torch.ops.aten
# Attentions and losses have many cases, pointwise operators one rule.
SETTINGS_OF_A_CASE = {"pointwise": 2, "own": 4}


def draws(target: torch._ops.OpOverload) -> list[Setting]:
    """Return the settings in which an operator is tried, the same in every run."""
    kind = "own" if target in CASES else "pointwise"
    return [Setting(*s) for s in settings(zlib.crc32(str(target).encode()), SETTINGS_OF_A_CASE[kind])]


@pytest.mark.parametrize("target", all_targets(), ids=str)
@pytest.mark.filterwarnings("ignore")
def test_rule_holds_whole_and_by_rank(target: torch._ops.OpOverload) -> None:
    accepted = 0
    for setting in draws(target):
        torch.manual_seed(0)
        cases = cases_of(target, setting.length)
        assert cases, f"{target} has a rule but no case: add one to tests/graph/rule_cases.py"
        accepted += sum(check_case(case, setting) for case in cases)
    assert accepted, f"the rule of {target} accepts none of its cases"
