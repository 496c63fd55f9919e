"""Fixtures of the tests that run on gloo ranks."""

from collections.abc import Iterator

import pytest

from tests.gloo.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four ranks on this machine; see `tests/gloo/pool.py`."""
    pool = Pool()
    yield pool
    pool.stop()
