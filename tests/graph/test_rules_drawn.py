"""Operators along the tokens on drawn shapes, ranges, layouts and values: whole and by every rank, gradients included.

The default run draws few examples, always the same; `CPCOMPILE_FUZZ=5000 ... -m slow` draws more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx

from cpcompile.errors import NoRule
from cpcompile.ir.placement import Sharded
from tests.graph.rule_checker import Case, Program, Setting

aten = torch.ops.aten
FEW = settings(max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=int(os.environ.get("CPCOMPILE_FUZZ", "1000")), derandomize=False)


@dataclass(frozen=True, slots=True)
class Place:
    """How the tokens of the first operand lie: its shape, and which factor of which dim is sharded."""

    shape: tuple[int, ...]
    at: Sharded
    setting: Setting

    @property
    def is_plain(self) -> bool:
        """Whether the sharded dim holds one element for each token."""
        return self.shape[self.at.dim] == self.at.count(self.setting.length)


@st.composite
def places(draw: Any, *, least_dims: int = 1, plain: bool = False) -> Place:
    """Return tokens in any dim; there may be fewer tokens than slots, and a range may leave some of them out."""
    setting = Setting(
        draw(st.integers(1, 13)), draw(st.integers(1, 5)), draw(st.sampled_from(("contiguous", "zig_zag")))
    )
    cut = draw(st.integers(0, min(3, setting.length - 1)))
    front = draw(st.integers(0, cut))
    outer, inner = (1, 1) if plain else draw(st.sampled_from(((1, 1), (1, 1), (2, 1), (1, 2), (2, 3))))
    shape = draw(st.lists(st.integers(1, 3), min_size=least_dims - 1, max_size=max(2, least_dims)))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, outer * (setting.length - cut) * inner)
    return Place(tuple(shape), Sharded(dim, inner, front, cut - front), setting)


KINDS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "any": lambda shape: torch.randn(shape, dtype=torch.float64),
    "ties": lambda shape: torch.randint(-1, 2, shape).double(),
    "equal": lambda shape: torch.full(shape, 0.7, dtype=torch.float64),
    "masked": lambda shape: torch.randn(shape, dtype=torch.float64).masked_fill(torch.rand(shape) > 0.6, -inf),
    "integers": lambda shape: torch.randint(-3, 4, shape),
    "truths": lambda shape: torch.rand(shape) > 0.5,
}
NUMBERS = ("any", "ties", "equal")


class RangeProgram(Program):
    """Shards a range of the tokens; the slots that it leaves out hold other numbers."""

    def shard(self, operand: fx.Node, at: Sharded) -> fx.Node:
        if at.covers_all:
            return super().shard(operand, at)
        value, tokens = operand.meta["val"], at.count(self.setting.length)
        outer = value.shape[at.dim] // (tokens * at.inner)
        behind = value.dim() - at.dim - 1
        x = operand
        with self.graph.inserting_before(self.node):
            for target, *arguments in (
                (aten.unflatten.int, at.dim, [outer, tokens, at.inner]),
                (aten.constant_pad_nd.default, [0, 0] * (behind + 1) + [at.front, at.back], 5),
                (aten.flatten.using_ints, at.dim, at.dim + 2),
            ):
                x = self.graph.call_function(target, (x, *arguments))
        x.meta["val"] = value
        return super().shard(x, at)


def check(case: Case, place: Place, *names: str) -> bool:
    """Check the rule with these operands sharded; tells whether it accepted them. Raises `WrongRuleError`."""
    program = RangeProgram(case, place.setting)
    try:
        program.push(dict.fromkeys(names, place.at))
    except NoRule:
        return False
    program.check()
    return True


def drawn_values(data: st.DataObject) -> Callable[..., torch.Tensor]:
    """Return a function from a shape and the kinds of values that an operator takes to such values."""
    number, seed = data.draw(st.integers(0, 59)), data.draw(st.integers(0, 99))

    def values(shape: tuple[int, ...], *kinds: str) -> torch.Tensor:
        torch.manual_seed(seed)
        return KINDS[kinds[number % len(kinds)]](shape)

    return values


Family = Callable[[st.DataObject], None]
FAMILIES: dict[str, Family] = {}


def family(function: Family) -> Family:
    FAMILIES[function.__name__] = function
    return function


@family
def scans(data: st.DataObject) -> None:
    """Where the dim holds more than tokens, they are refused."""
    kinds = (*NUMBERS, "integers", "truths")
    targets = {
        aten.cumsum.default: kinds,
        aten.cumprod.default: kinds,
        aten.cummax.default: kinds,
        aten.cummin.default: kinds,
        aten.logcumsumexp.default: NUMBERS,
    }
    place, values = data.draw(places()), drawn_values(data)
    for target in targets:
        case = Case(target, (values(place.shape, *targets[target]), place.at.dim))
        assert check(case, place, "self") == place.is_plain


TRUTH, ORDER = ("ties", "truths", "integers"), (*NUMBERS, "masked", "integers")


@family
def reductions_of_one_dim(data: st.DataObject) -> None:
    targets = {
        aten.any.dim: TRUTH,
        aten.all.dim: TRUTH,
        aten.max.dim: (*ORDER, "truths"),
        aten.min.dim: ORDER,
        aten.argmax.default: ORDER,
        aten.argmin.default: ORDER,
        aten.prod.dim_int: (*NUMBERS, "integers"),
    }
    place, values, keep = data.draw(places()), drawn_values(data), data.draw(st.booleans())
    for target, kinds in targets.items():
        assert check(Case(target, (values(place.shape, *kinds), place.at.dim, keep)), place, "self")


@family
def reductions_of_several_dims(data: st.DataObject) -> None:
    targets = {
        aten.amax.default: ORDER,
        aten.amin.default: ORDER,
        aten.logsumexp.default: NUMBERS,
        aten.any.dims: TRUTH,
        aten.all.dims: TRUTH,
        aten.sum.dim_IntList: (*NUMBERS, "integers"),
        aten.mean.dim: NUMBERS,
        aten.var_mean.correction: NUMBERS,
        aten.std.correction: ("any",),
    }
    place, values, keep = data.draw(places()), drawn_values(data), data.draw(st.booleans())
    others = [dim for dim in range(len(place.shape)) if dim != place.at.dim]
    dims = [place.at.dim, *(dim for dim in others if data.draw(st.booleans()))]
    correction = data.draw(st.sampled_from((0, 0.5)))
    for target, kinds in targets.items():
        x = values(place.shape, *kinds)
        case = Case(target, (x, dims, keep))
        if target in (aten.var_mean.correction, aten.std.correction):
            if x.sum(dims).numel() == x.numel():
                continue  # nothing varies
            case = Case(target, (x, dims), {"correction": correction, "keepdim": keep})
        assert check(case, place, "self")


@family
def reductions_of_all(data: st.DataObject) -> None:
    targets = {
        aten.max.default: ORDER,
        aten.min.default: ORDER,
        aten.argmax.default: ORDER,
        aten.argmin.default: ORDER,
        aten.any.default: TRUTH,
        aten.all.default: TRUTH,
        aten.prod.default: (*NUMBERS, "integers"),
        aten.count_nonzero.default: TRUTH,
        aten.sum.default: (*NUMBERS, "integers"),
        aten.mean.default: NUMBERS,
    }
    place, values = data.draw(places()), drawn_values(data)
    for target, kinds in targets.items():
        assert check(Case(target, (values(place.shape, *kinds),)), place, "self")


@family
def norms(data: st.DataObject) -> None:
    place, values = data.draw(places()), drawn_values(data)
    for order in (1, 2, inf, -inf):
        x = values(place.shape, *NUMBERS)
        assert check(Case(aten.linalg_vector_norm.default, (x, order, [place.at.dim])), place, "self")


@family
def softmaxes(data: st.DataObject) -> None:
    place, values = data.draw(places()), drawn_values(data)
    for target in (aten.softmax.int, aten.log_softmax.int, aten._safe_softmax.default):
        kinds = (*NUMBERS, "masked") if target is aten._safe_softmax.default else NUMBERS
        assert check(Case(target, (values(place.shape, *kinds), place.at.dim)), place, "self")


@family
def triangles(data: st.DataObject) -> None:
    place, values = data.draw(places(least_dims=2)), drawn_values(data)
    diagonal = data.draw(st.integers(-3, 3))
    for target in (aten.tril.default, aten.triu.default):
        assert check(Case(target, (values(place.shape, "any", "integers"), diagonal)), place, "self")


@family
def losses(data: st.DataObject) -> None:
    """An operand that every rank has whole is cut where the other one's tokens are, if they are alone in their dim."""
    names = data.draw(st.sampled_from((("self", "target"), ("self",), ("target",))))
    place, values = data.draw(places(plain=len(names) == 1)), drawn_values(data)
    x, reduction = values(place.shape, *NUMBERS), data.draw(st.integers(0, 2))
    for target in (aten.mse_loss.default, aten.huber_loss.default, aten.binary_cross_entropy_with_logits.default):
        assert check(Case(target, (x, x.flip(0) + 0.3), {"reduction": reduction}), place, *names)


@family
def convolutions(data: st.DataObject) -> None:
    """Those whose result has more tokens than the sequence are refused here, because nothing cuts it back."""
    place = data.draw(places(plain=True))
    values = drawn_values(data)
    size, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    groups, is_batched = data.draw(st.sampled_from((1, 2))), data.draw(st.booleans())
    padding: Any = data.draw(st.one_of(st.integers(0, 4), st.sampled_from(("same", "valid"))))
    reach, at, tokens = dilation * (size - 1), place.at, place.at.count(place.setting.length)
    shorter = reach - (2 * padding if isinstance(padding, int) else reach if padding == "same" else 0)
    if tokens - shorter < 1:
        return
    shape = (*((2,) if is_batched else ()), 2 * groups, tokens)
    x, weight = values(shape, "any"), values((2 * groups, 2, size), "any")
    target = aten.conv1d.padding if isinstance(padding, str) else aten.conv1d.default
    padding = padding if isinstance(padding, str) else [padding]
    case = Case(target, (x, weight, values((2 * groups,), "any"), [1], padding, [dilation], groups))
    there = Place(shape, Sharded(len(shape) - 1, 1, at.front, at.back), place.setting)
    fits = at.front >= 0 and at.front + at.back + shorter >= 0
    accepted = check(case, there, "input")
    assert accepted or shorter < 0 or not fits


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_few(name: str) -> None:
    FEW(given(st.data())(FAMILIES[name]))()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_many(name: str) -> None:
    MANY(given(st.data())(FAMILIES[name]))()
