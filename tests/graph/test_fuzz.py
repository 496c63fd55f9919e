"""Random programs are exact on any number of ranks, or refused: never wrong.

The default run draws few examples, always the same. Thousands, and how many were refused for which reason:

    CPCOMPILE_FUZZ=2000 python -m pytest tests/graph/test_fuzz.py -m slow -s --timeout 0

Each failure prints the smallest program found as a script that shows what became of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, event, given, settings

from tests.fuzz.elements import AROUND, FLAT, LOCAL, START, Element
from tests.fuzz.ends import ENDS
from tests.fuzz.grammar import GROUPS, Block, program_of, programs
from tests.fuzz.program import EXACT, REFUSALS, Program, outcome
from tests.fuzz.tensors import tensor_programs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*use gather in place of:UserWarning"),
    pytest.mark.filterwarnings("ignore:one graph for all lengths cannot be sharded:UserWarning"),
    pytest.mark.filterwarnings("ignore:nothing in this model could be sharded:UserWarning"),
]

FEW = settings(
    max_examples=16,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=int(os.environ.get("CPCOMPILE_FUZZ", "500")), derandomize=False)


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Say how many programs were exact and why the others were refused: a fuzzer that is always refused tests nothing."""
    REFUSALS.clear()
    yield
    total = sum(REFUSALS.values())
    print(f"\n{REFUSALS[EXACT]} of {total} programs exact; the others were refused:")
    for reason, times in REFUSALS.most_common():
        if reason != EXACT:
            print(f"  {times:5d}  {reason}")


def check(program: Program) -> None:
    event(outcome(program))


def plainly(element: Element, inside: tuple[Block, ...] = (), **chosen: str) -> Block:
    """Return an element with the first of each of its choices, or the given ones."""
    return Block(element, {name: values[0] for name, values in element.choices.items()} | chosen, inside)


LINEAR = plainly(LOCAL["linear"])
LOSS = plainly(ENDS["cross entropy"])
MIDDLES = {name: element for group in GROUPS.values() for name, element in group.items()}
# Refused unless hidden states may be gathered; each must leave this list when it becomes exact.
WAITING: set[str] = set()
# Refused, and to stay so: statistics of the whole batch or of all tokens of the sequence at once, and what Dynamo breaks at.
REFUSED = {"token norm", "recurrent"}


def alone(name: str, **chosen: str) -> list[Block]:
    """Return a model that has one element beside what every model has."""
    if name in ENDS:
        return [plainly(START), LINEAR, plainly(ENDS[name], **chosen)]
    if name in MIDDLES:
        return [plainly(START), plainly(MIDDLES[name], **chosen), LOSS]
    return [plainly(START), plainly({**AROUND, **FLAT}[name], (LINEAR,), **chosen), LOSS]


ELEMENTS = {**MIDDLES, **AROUND, **FLAT, **ENDS}


@pytest.mark.parametrize("name", ELEMENTS)
def test_element_alone(name: str) -> None:
    """A grammar whose elements are refused would prove nothing."""
    found = outcome(program_of(alone(name), length=7, world_size=3, options={"balancer": "zig_zag"}))
    if name in WAITING | REFUSED:
        assert found != EXACT, f"{name} is exact now: take it out of the list"
    else:
        assert found == EXACT


CHOICES = [
    pytest.param(name, {key: value}, id=f"{name}-{key}-{i}")
    for name, element in ELEMENTS.items()
    for key, values in element.choices.items()
    for i, value in enumerate(values)
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chosen"), CHOICES)
@pytest.mark.parametrize("is_dynamic", [True, False])
def test_every_choice_alone(name: str, chosen: dict[str, str], is_dynamic: bool) -> None:
    options = {"balancer": "zig_zag", "strategy": "ring", "dynamic": is_dynamic, "strict": is_dynamic}
    outcome(program_of(alone(name, **chosen), length=13, world_size=4, options=options))


@pytest.mark.always
@FEW
@given(programs())
def test_few_programs(program: Program) -> None:
    check(program)


@FEW
@given(tensor_programs())
def test_few_tensor_programs(program: Program) -> None:
    check(program)


@pytest.mark.slow
@MANY
@given(programs())
def test_many_programs(program: Program) -> None:
    check(program)


@pytest.mark.slow
@MANY
@given(tensor_programs())
def test_many_tensor_programs(program: Program) -> None:
    check(program)
