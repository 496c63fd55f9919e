"""Which cases of a test run by default: as many as its seconds allow, drawn by their names, so the same ones each time.

`case_seconds.json` has the seconds of a case, by test, as one of two workers on two cores took them; tests that it does not name
take one. What takes too long for every run is slow. To measure again, after tests were added or changed:

    make test PYTEST="-n 2 --dist worksteal -m 'not gpu' --write-seconds"
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("case_seconds.json")
OF_A_TEST = 4.0  # seconds for the cases of a test
OF_A_CASE = 15.0  # what takes longer is slow, unless it is marked to run always
UNKNOWN = 1.0


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Mark the cases slow that are not drawn."""
    known = json.loads(FILE.read_text())
    tests: dict[str, dict[str, pytest.Item]] = defaultdict(dict)
    for item in items:
        if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            tests[owner(item.nodeid)][item.nodeid] = item
    for test, cases in tests.items():
        seconds = known.get(test, UNKNOWN)
        if any(item.get_closest_marker("always") for item in cases.values()):
            seconds = min(seconds, OF_A_CASE)
        for name in cases.keys() - drawn(cases, seconds):
            cases[name].add_marker(pytest.mark.slow)


def owner(case: str) -> str:
    """Return the test that a case is of: both are ids of pytest."""
    return case.split("[")[0]


def drawn(cases: Mapping[str, object], seconds: float) -> set[str]:
    """Return the cases of a test that run by default, if each takes so many seconds."""
    if seconds > OF_A_CASE:
        return set()
    return set(sorted(cases, key=lambda name: (zlib.crc32(name.encode()), name))[: max(1, int(OF_A_TEST / seconds))])


class Watch:
    """Adds up the seconds of each case, and writes the means of the tests in the end."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count what a case, its fixtures included, took."""
        self._seconds[report.nodeid] += report.duration

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        FILE.write_text(json.dumps(merged(json.loads(FILE.read_text()), self._seconds), indent=0) + "\n")


def merged(known: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Return the seconds of a case by test: the mean of what was measured by case, or what was known.

    A test without cases needs no entry, unless it is about to be slow.
    """
    cases: dict[str, list[float]] = defaultdict(list)
    for name, seconds in measured.items():
        cases[owner(name)].append(seconds)
    means = {test: max(round(sum(seconds) / len(seconds), 2), 0.01) for test, seconds in cases.items()}
    have_cases = {owner(name) for name in measured if name != owner(name)}
    needed = {test: seconds for test, seconds in means.items() if test in have_cases or seconds > OF_A_CASE / 2}
    return dict(sorted(({test: known[test] for test in known.keys() - means.keys()} | needed).items()))
