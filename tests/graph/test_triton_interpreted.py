"""The kernels written in Triton, on a CPU by Triton's interpreter, against the math kernel in float64."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from cpcompile.runtime.kernels import merge, triton_merge
from cpcompile.runtime.kernels.triton_launch import Tiles
from tests import triton_cases

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    # The interpreter makes numbers of arrays, and NumPy warns of what is meant: log 0 is -inf, and so is a multiple of the
    # smallest number.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning"),
]
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in a process of its own, by test_interpreted")


@pytest.mark.skipif(IS_INTERPRETED, reason="this is that process")
def test_interpreted() -> None:
    """Triton decides at its import whether it interprets, so the other tests run in a process of their own."""
    numpy = pytest.importorskip("numpy")
    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("Triton's interpreter needs NumPy below 2.4, which still makes a number of an array of one")
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, "-m", "pytest", "-q", __file__, "--rootdir", os.getcwd()]
    done = subprocess.run(command, env=environment | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@interpreted
@pytest.mark.parametrize("name", triton_cases.BLOCKS)
def test_block(name: str) -> None:
    triton_cases.check(name, 45, 60, 20, 12, torch.float32, "cpu", Tiles(16, 32, 4, 2))


@interpreted
@pytest.mark.parametrize("name", triton_cases.OF_LENGTHS)
def test_lengths(name: str) -> None:
    triton_cases.check(name, 70, 70, 16, 16, torch.float32, "cpu", Tiles(16, 16, 4, 2))


@interpreted
@pytest.mark.parametrize("name", ["causal", "both sides", "prefix"])
@pytest.mark.parametrize("rows, columns", [(16, 64), (64, 16), (1, 33)])
def test_shapes(rows: int, columns: int, name: str) -> None:
    triton_cases.check(name, rows, columns, 16, 32, torch.float32, "cpu", Tiles(32, 16, 4, 2))


@interpreted
def test_merge() -> None:
    torch.manual_seed(0)
    made = (torch.randn(2, 3 + rows, 3, 20).transpose(1, 2) for rows in (50, 41, 41))
    held, block_out, total = made
    lse, block_lse = torch.randn(2, 3, 53), torch.randn(2, 3, 44)
    lse[0, :, 12:20] = block_lse[0, :, 8:15] = -torch.inf
    out, block_out = held[:, :, 9:53], block_out.half()
    expected, expected_lse = out.double(), lse[:, :, 9:53].double()
    merge.merge_(expected, expected_lse, block_out.double(), block_lse.double())
    triton_merge.merge_(out, lse[:, :, 9:53], block_out, block_lse)
    torch.testing.assert_close(out, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[:, :, 9:53], expected_lse.float(), rtol=1e-6, atol=1e-6)
    for own in (total, total.half()):
        wanted = (own.float() + block_out).to(own.dtype)
        triton_merge.add_(own, block_out)
        assert torch.equal(own, wanted)
    line = torch.ones(7, dtype=torch.float16)
    triton_merge.add_(line, torch.arange(7.0))
    assert line.tolist() == [1, 2, 3, 4, 5, 6, 7]
