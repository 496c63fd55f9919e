"""Every pointwise operator is finite for all numbers that are tried, or `FINITE_AT` says for which it is."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cpcompile.rules.along_tokens import ExtendedRule
from cpcompile.rules.pointwise import pointwise
from cpcompile.rules.registry import RULES, IndexedRule
from cpcompile.rules.undefined import FINITE_AT

NUMBERS = (0.0, -2.5, 3.0, -100.0, 100.0)
LARGE = (-200.0, 200.0)  # whose powers overflow in float32
# What an argument that has no default is, by its type.
ARGUMENTS: dict[str, Any] = {"int": 2, "float": 2.0, "bool": True, "str": "floor"}
Target = torch._ops.OpOverload


def is_pointwise(target: Target) -> bool:
    rule = RULES[target]
    while isinstance(rule, ExtendedRule):
        rule = rule.base
    return isinstance(rule, IndexedRule) and rule.indices is pointwise


POINTWISE = [target for target in RULES if is_pointwise(target)]


def tensor_names(target: Target) -> list[str]:
    return [a.name for a in target._schema.arguments if str(a.type) == "Tensor"]


def run(target: Target, given: dict[str, float], dtype: torch.dtype, number: float = 2) -> Iterator[torch.Tensor]:
    """Yield the results of a call and the gradients of its operands for a gradient of 0."""
    operands = {n: torch.full((1,), x, dtype=dtype).requires_grad_(dtype.is_floating_point) for n, x in given.items()}
    needed = [a for a in target._schema.arguments if a.name in operands or not a.has_default_value()]
    values = operands | {
        a.name: number if str(a.type) == "number" else ARGUMENTS.get(str(a.type))
        for a in needed
        if a.name not in operands
    }
    found = target(
        *(values[a.name] for a in needed if not a.kwarg_only),
        **{a.name: values[a.name] for a in needed if a.kwarg_only},
    )
    for result in found if isinstance(found, tuple | list) else [found]:
        yield result.detach()
        if result.requires_grad:
            zeros = torch.zeros_like(result)
            grads = torch.autograd.grad(result, [*operands.values()], zeros, allow_unused=True, retain_graph=True)
            yield from (grad for grad in grads if grad is not None)


def dtypes_of(target: Target) -> list[torch.dtype]:
    """Return the dtypes that an operator takes; none if it takes other arguments than are known here."""
    found = []
    for dtype in (torch.float64, torch.int64):
        with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
            list(run(target, dict.fromkeys(tensor_names(target), 1.0), dtype))
            found.append(dtype)
    return found


def is_finite(target: Target, given: dict[str, float], dtype: torch.dtype, number: float) -> bool:
    try:
        found = list(run(target, given, dtype, number))
    except RuntimeError:  # integers have no infinity
        return False
    return not dtype.is_floating_point or all(bool(x.isfinite().all()) for x in found)


def failures(target: Target, dtype: torch.dtype, fixed: dict[str, float], *more: float, number: float = 2) -> list[Any]:
    """Return the operands, of the numbers that are tried, for which something is not finite or an error."""
    free = [name for name in tensor_names(target) if name not in fixed]
    tried = (dict(zip(free, x, strict=True)) | fixed for x in itertools.product((*NUMBERS, *more), repeat=len(free)))
    return [given for given in tried if not is_finite(target, given, dtype, number)]


def numbers_of(target: Target) -> dict[str, float]:
    return {name: harmless.number for name, harmless in FINITE_AT.get(target, {}).items()}


@pytest.mark.filterwarnings("ignore")
def test_an_operator_that_is_not_finite_everywhere_says_where_it_is() -> None:
    calls = [(target, dtype) for target in POINTWISE for dtype in dtypes_of(target)]
    assert len(calls) > 300
    wrong = {call: found for call in calls if (found := failures(*call, numbers_of(call[0])))}
    assert not wrong


@pytest.mark.filterwarnings("ignore")
def test_what_is_said_is_needed() -> None:
    said = [target for target in FINITE_AT if target in POINTWISE and torch.float64 in dtypes_of(target)]
    assert len(said) > 40
    needless = [t for t in said if not any(failures(t, torch.float32, {}, *LARGE, number=n) for n in (2, -1.5))]
    assert not needless


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sign", [1, -1])
def test_all_numbers_of_a_sign_are_harmless(sign: int) -> None:
    known = [target for target in POINTWISE if torch.float64 in dtypes_of(target)]
    said = {(target, name) for target in known for name, of in FINITE_AT.get(target, {}).items() if of.sign == sign}
    wrong = {
        (str(target), name): found
        for target, name in said
        for number in (-100.0, -2.5, -1e-3, 1e-3, 3.0, 100.0)
        if number * sign > 0 and (found := failures(target, torch.float64, {name: number}))
    }
    assert said and not wrong
