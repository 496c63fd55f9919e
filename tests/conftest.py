"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gloo.pool import Pool

GLOO = Path(__file__).parent / "gloo"


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the gloo ranks once the tests that need them are done: their threads take time from the others even when idle."""
    if GLOO not in item.path.parents:
        for pool in Pool.started:
            pool.stop()
