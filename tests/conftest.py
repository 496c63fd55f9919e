"""What all tests share."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

# Scripts and ranks that tests start: tensors are small, and the workers of pytest have the cores. Where Triton is installed, each
# process that imports Inductor would start others that wait for kernels to compile, and import torch first.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_WARM_POOL", "0")

from tests.gloo.pool import Pool

GLOO = Path(__file__).parent / "gloo"
# A test with many cases runs so many of them by default, the same ones each time; the others are marked slow.
CASES = 3
# Fewer where a case takes tens of seconds; all where a case takes none.
FEWER_CASES = {
    "gloo/test_checkpoints.py": 2,
    "gloo/test_documents.py": 2,
    "gloo/test_examples.py": 3,
    "gloo/test_fsdp.py": 2,
    "gloo/test_integrations.py": 2,
    "graph/test_parity.py": 2,
}
ALL_CASES = {
    "gloo/test_traffic.py",
    "graph/test_all_to_all.py",
    "graph/test_architecture.py",
    "graph/test_balance.py",
    "graph/test_config.py",
    "graph/test_cost.py",
    "graph/test_diagnostics.py",
    "graph/test_docs_code.py",
    "graph/test_kernels.py",
    "graph/test_operators_of_models.py",
    "graph/test_reference.py",
    "graph/test_report.py",
    "graph/test_runtime.py",
    "graph/test_traffic.py",
    "graph/test_train_options.py",
}


@pytest.hookimpl
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all cases of a test slow but for a few, which are drawn by their names."""
    tests: dict[str, list[tuple[int, pytest.Item]]] = {}
    for item in items:
        if not item.get_closest_marker("slow") and not item.get_closest_marker("gpu"):
            name = item.nodeid.removeprefix("tests/")
            tests.setdefault(name.split("[")[0], []).append((zlib.crc32(name.encode()), item))
    for test, cases in tests.items():
        file = test.split("::")[0]
        if file not in ALL_CASES:
            for _, item in sorted(cases, key=lambda case: case[0])[FEWER_CASES.get(file, CASES) :]:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the gloo ranks once the tests that need them are done: their threads take time from the others even when idle."""
    if GLOO not in item.path.parents:
        for pool in Pool.started:
            pool.stop()
