"""Which cases of a test run by default."""

from __future__ import annotations

import json

import pytest

from tests.case_budget import FILE, OF_A_CASE, OF_A_TEST, drawn, merged


@pytest.mark.parametrize(
    ("seconds", "number"),
    [(OF_A_TEST / 100, 9), (OF_A_TEST / 4, 4), (OF_A_TEST, 1), (OF_A_CASE, 1), (OF_A_CASE + 1, 0)],
)
def test_as_many_cases_as_the_time_of_a_test_allows(seconds: float, number: int) -> None:
    cases = {f"test[{case}]": None for case in range(9)}
    assert len(drawn(cases, seconds)) == number
    assert drawn(cases, seconds) == drawn(dict(reversed(cases.items())), seconds)


def test_what_was_measured_takes_the_place_of_what_was_known() -> None:
    known = {"a": 1.0, "b": 30.0, "left": 2.0}
    measured = {"a[x]": 3.0, "a[y]": 4.0, "b": 5.0, "c": OF_A_CASE, "quick": 0.1}
    assert merged(known, measured) == {"a": 3.5, "c": OF_A_CASE, "left": 2.0}


def test_each_test_that_is_named_exists() -> None:
    root = FILE.parent.parent
    for test in json.loads(FILE.read_text()):
        file, *_, name = test.split("::")
        assert f"def {name}(" in (root / file).read_text(), test
