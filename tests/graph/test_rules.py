"""Every rule is proven by execution: whole, and by every rank on its own tokens."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Partial, Placement, Sharded
from cpcompile.rules import RULES, Decision, rule
from tests.graph.rule_cases import CASES, all_targets, cases_of, settings
from tests.graph.rule_checker import Case, Setting, WrongRuleError, check_case, check_push

aten = torch.ops.aten
# Pointwise operators are many and share one rule.
SETTINGS_OF_A_CASE = {"pointwise": 2, "own": 3}


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
        accepted += sum(check_case(case, setting) for case in cases_of(target, setting.length))
    assert accepted, f"the rule of {target} accepts none of its cases"


def test_every_operator_has_a_case() -> None:
    without = [str(target) for target in RULES if not cases_of(target, 4)]
    assert not without, f"add a case to tests/graph/rule_cases.py for {', '.join(without)}"
    assert not set(CASES) - set(RULES)


def test_operators_that_write_and_truth_values_have_no_rule() -> None:
    assert not [target for target in RULES if target._schema.is_mutable]
    assert aten.equal.default not in RULES


@pytest.mark.parametrize(
    ("target", "args", "sharded"),
    [
        (aten.roll.default, (torch.rand(2, 6), [1]), {"self": Sharded(1)}),
        (aten.gather.default, (torch.rand(2, 6), 0, torch.zeros(1, 3, dtype=torch.int64)), {"self": Sharded(1)}),
        (aten.embedding.default, (torch.rand(7, 3), torch.arange(6), -1, True), {"indices": Sharded(0)}),
        (aten.repeat_interleave.self_int, (torch.rand(2, 6), 2), {"self": Sharded(1)}),
        (aten.feature_dropout.default, (torch.rand(2, 3, 6), 0.5, True), {"input": Sharded(2)}),
        (aten.linear.default, (torch.rand(6), torch.rand(4, 6), torch.rand(4)), {"input": Sharded(0)}),
        (aten.reshape.default, (torch.rand(6, 4), [4, 6]), {"self": Sharded(0)}),
        (aten.copy_.default, (torch.rand(2, 6), torch.rand(2, 6)), {"src": Sharded(1)}),
        (
            aten.cross_entropy_loss.default,
            (torch.rand(6, 5), torch.rand(6, 5), None, 1, -100, 0.1),
            {"self": Sharded(0)},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_what_would_be_wrong_is_refused(target: Any, args: tuple[Any, ...], sharded: dict[str, Sharded]) -> None:
    assert not check_push(Case(target, args), Setting(6, 2, "zig_zag"), sharded)


@pytest.mark.parametrize(
    ("target", "args", "sharded"),
    [
        (aten.cumsum.default, (torch.rand(12).double(), 0), {"self": Sharded(0)}),
        (aten.add.Tensor, (torch.rand(12, 6), torch.rand(12, 6)), {"self": Sharded(0, 2), "other": Sharded(1)}),
        (aten.add.Tensor, (torch.rand(12, 6), torch.rand(12, 6)), {"self": Sharded(0, 2), "other": Sharded(0)}),
        (aten.slice_scatter.default, (torch.rand(2, 6), torch.rand(2, 2), 1, 0, 2), {"self": Sharded(1)}),
        (aten.view.default, (torch.rand(6, 4), [3, 8]), {"self": Sharded(0)}),
        (aten.cat.default, ([torch.rand(2, 6), torch.rand(2, 5)], 1), {"tensors.0": Sharded(1)}),
        (aten.unfold.default, (torch.rand(2, 6), 1, 3, 3), {"self": Sharded(1)}),
        (aten.unfold.default, (torch.rand(2, 6), 1, 3, 2), {"self": Sharded(1)}),
        (aten.avg_pool1d.default, (torch.rand(2, 3, 6).double(), [2]), {"self": Sharded(2)}),
        (
            aten.conv1d.default,
            (torch.rand(2, 3, 6).double(), torch.rand(4, 3, 2).double(), None, [2]),
            {"input": Sharded(2)},
        ),
        (aten.repeat_interleave.self_int, (torch.rand(2, 6), 2, 1), {"self": Sharded(1)}),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_tokens_are_rearranged(
    target: Any, args: tuple[Any, ...], sharded: dict[str, Sharded], world_size: int
) -> None:
    assert check_push(Case(target, args), Setting(6, world_size, "zig_zag"), sharded)


@dataclass(frozen=True, slots=True)
class Wrong:
    """A rule that claims these placements whatever it is asked."""

    operands: dict[str, Placement]
    result: Placement
    notation: str = "wrong on purpose"

    def push(self, call: Call, operands: Mapping[str, Sharded], length: Any) -> Decision:
        return Decision(self.operands, (self.result,))

    def pull(self, call: Call, result: Sharded, length: Any) -> Decision | None:
        return Decision(self.operands, (result,))


AT0, AT1, AT2 = Sharded(0), Sharded(1), Sharded(2)
PLACED = Setting(6, 2, "zig_zag")


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        (aten.mul.Tensor, Wrong({"self": AT1, "other": FULL}, AT1)),  # the other operand is not localised
        (aten.add.Tensor, Wrong({"self": AT1, "other": AT1}, Partial())),
        (aten.transpose.int, Wrong({"self": AT1}, AT1)),  # the dims are swapped, the tokens not
        (aten.reshape.default, Wrong({"self": AT1}, AT0)),
        (aten.softmax.int, Wrong({"self": AT1}, AT1)),  # along the tokens
        (aten.flip.default, Wrong({"self": AT1}, AT1)),
        (aten.sum.dim_IntList, Wrong({"self": AT1}, FULL)),  # every rank has its own sum
        (aten.sum.dim_IntList, Wrong({"self": AT1}, Partial())),  # padding slots count
        (aten.matmul.default, Wrong({"self": AT1, "other": FULL}, AT0)),
        (aten.embedding.default, Wrong({"weight": FULL, "indices": AT1}, AT2)),
        (aten.layer_norm.default, Wrong({"input": AT1}, Partial())),
        (aten.cross_entropy_loss.default, Wrong({"self": AT0, "target": AT0}, Partial())),  # padding labels count
        (torch.ops.cpcompile.attention.default, Wrong({"q": AT2, "k": AT2, "v": AT2}, AT1)),
    ],
    ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "",
)
def test_checker_sees_a_wrong_rule(target: Any, wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    cases = cases_of(target, PLACED.length)
    assert sum(check_case(case, PLACED) for case in cases), "the right rule passes"
    monkeypatch.setitem(RULES, target, wrong)
    with pytest.raises(WrongRuleError):
        for case in cases:
            check_case(case, PLACED)


def test_checker_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values alone do not tell: with `scale_grad_by_freq`, every forward value is right."""
    case = Case(aten.embedding.default, (torch.rand(3, 2, dtype=torch.float64), torch.arange(6) % 3, -1, True))
    monkeypatch.setitem(RULES, aten.embedding.default, Wrong({"weight": FULL, "indices": AT0}, AT0))
    with pytest.raises(WrongRuleError, match="gradient"):
        check_push(case, PLACED, {"indices": AT0})


@pytest.mark.parametrize("setting", [Setting(8, 4, "contiguous"), Setting(5, 3, "zig_zag"), Setting(6, 1, "zig_zag")])
def test_views_follow_the_factor_not_the_size(setting: Setting) -> None:
    """A dim of the size of the sequence that holds no token is not mistaken for one."""
    s = setting.length
    case = Case(aten.reshape.default, (torch.rand(s, s, s), [s * s, s]))
    assert check_push(case, setting, {"self": Sharded(0)})
    assert check_push(case, setting, {"self": Sharded(1)})
    assert check_push(case, setting, {"self": Sharded(2)})


def test_second_rule_for_an_operator_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"aten.linear.default already has the rule \[... k\]"):
        rule(aten.linear.default)(RULES[aten.linear.default].indices)  # type: ignore[attr-defined]
