"""No tensor of S x S elements is left in the program of a rank, and none is made while it runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
# Dynamo traces torch's own indexing inside of mask_mods so.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]

PATH = Path(__file__).parents[2] / "benchmarks" / "mask_memory.py"
LENGTH, RANKS = 512, 4


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mask_memory", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


CASES = [
    ("llama sdpa, causal", "causal"),
    ("llama sdpa, padding", "causal, key padding"),
    ("mistral sdpa, window and documents", "causal, window 64, documents"),
    ("llama eager, documents", "causal, documents"),
    ("llama flex, documents", "causal, documents"),
]


@pytest.mark.parametrize(("name", "words"), CASES)
def test_no_square_is_left(benchmark: ModuleType, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, implementation, kind, changes = benchmark.CASES[name]
    monkeypatch.setitem(benchmark.CASES, name, (family, implementation, kind, dict.fromkeys(changes, 64)))
    row = benchmark.measured(name, LENGTH, RANKS)
    assert row["masks"] == [words]
    assert row["one_device"]["squares"] > 0, "the untouched model makes masks, so that the measurement sees them"
    assert row["one_rank"]["squares"] == 0
    assert row["one_rank"]["largest"] < LENGTH**2 / 2


def test_what_is_held_grows_with_the_length_and_not_with_its_square(benchmark: ModuleType) -> None:
    short, long = (benchmark.measured("llama sdpa, documents", n, RANKS) for n in (LENGTH, 4 * LENGTH))
    assert long["one_rank"]["bytes"] < 5 * short["one_rank"]["bytes"]
    assert long["one_device"]["bytes"] > 10 * short["one_device"]["bytes"]
