"""What all tests share."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

# Scripts and ranks that tests start: tensors are small, and the workers of pytest have the cores. Where Triton is installed, each
# process that imports Inductor would start others that wait for kernels to compile, and import torch first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_WARM_POOL", "0")

from tests import case_budget
from tests.gloo.pool import Pool

GLOO = Path(__file__).parent / "gloo"

# pytest listens to each logger that does not propagate. torch prints each graph for who listens to this one: a tenth of the time.
logging.getLogger("torch.__trace").propagate = True


@pytest.hookimpl
def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option to measure the tests."""
    parser.addoption("--write-seconds", action="store_true", help=f"write what cases take to {case_budget.FILE.name}")


@pytest.hookimpl
def pytest_configure(config: pytest.Config) -> None:
    """Measure, in the process that the workers report to."""
    if config.getoption("--write-seconds") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(case_budget.Watch())


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out by default what takes long and the cases beyond a few seconds of a test."""
    case_budget.mark_slow(items)


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the gloo ranks once the tests that need them are done: their threads take time from the others even when idle."""
    if GLOO not in item.path.parents:
        for pool in Pool.started:
            pool.stop()
