"""One process for each GPU, over NCCL: loss and every gradient of a small Llama, and of a model that mixes tokens
in other ways, in float32 and bfloat16.

    python -m pytest tests/gpu -m gpu

The truth is the untouched model in float64 with the same weights. Rounding differs between any two ways to compute in half
precision, so the context-parallel error is measured against the error that one device makes itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests.gpu.jobs import Named, Result, results_of, run_cases, run_ranks
from tests.gpu.model_errors import check, model_errors
from tests.models import Mixer, batch, llama

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

WORLD_SIZE = 2
LIMIT = 360.0  # seconds for all cases together
LENGTHS = (256, 301)  # the second needs padding, and no other graph
STRATEGIES, LAYOUTS = ("ulysses", "ring", "gather"), ("contiguous", "zig_zag")
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Case(Named):
    """One way to run the model."""

    strategy: str
    layout: str
    inner: str
    dtype: str
    model: str = "llama"


CASES = [
    *(Case("auto", layout, "eager", "float32", "mixer") for layout in LAYOUTS),
    *(Case(strategy, layout, "eager", "bfloat16") for strategy in STRATEGIES for layout in LAYOUTS),
    *(Case(strategy, "zig_zag", "eager", "float32") for strategy in STRATEGIES),
    *(Case(strategy, "zig_zag", "inductor", "bfloat16") for strategy in STRATEGIES),
    Case("ring", "contiguous", "inductor", "float32"),
]
BUILD = {"llama": lambda: llama(**SIZES), "mixer": lambda: Mixer(256)}


def run_case(case: Case, mesh: DeviceMesh) -> Result:
    """Return the errors of a case at each length."""
    build = BUILD[case.model]
    batches = {str(length): batch(build(), length) for length in LENGTHS}
    options = {"strategy": case.strategy, "balancer": case.layout, "inner": case.inner}
    return model_errors(build, case.dtype, batches, mesh, **options)


def work(rank: int, world_size: int, folder: str, device: str = "cuda") -> None:
    """Run all cases on one rank."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
        device_id=torch.device(device, rank) if device == "cuda" else None,
    )
    mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("cp",))
    run_cases(CASES, rank, folder, lambda case: run_case(case, mesh))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Results of all cases, run once."""
    if torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} GPUs")
    with tempfile.TemporaryDirectory() as path:
        run_ranks(work, WORLD_SIZE, path, LIMIT)
        yield Path(path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_device(folder: Path, case: Case) -> None:
    for rank, result in enumerate(results_of(case, WORLD_SIZE, folder)):
        print(f"{case} rank {rank}: {result}")
        # One graph serves all lengths; Inductor may make a second one for lengths that its kernels' alignment divides.
        assert result["graphs"] <= (2 if case.inner == "inductor" else 1)
        check(result)
