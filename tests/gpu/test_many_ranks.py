"""Four and eight ranks that share the GPUs there are, one at least: attention and models are those of one device.

    python -m pytest tests/gpu/test_many_ranks.py -m gpu

A process for each rank, messages in symmetric memory, which torch lets ranks of one GPU share on demand. NCCL does not, so that
the hosts talk over gloo. GPUs turn from rank to rank here: this says nothing of speed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.balance.token_order import TokenOrder
from cpcompile.runtime.transport import choice as transport
from tests.gpu.jobs import Named, Result, results_of, run_cases, run_ranks
from tests.gpu.model_errors import check, model_errors
from tests.models import Mixer, batch, llama
from tests.packing import PackedLM, packed_batch

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1300)]

LIMIT = 600.0  # seconds for all cases of a number of ranks, most of which Triton compiles
NUM_RUNS = 3  # on other inputs each: the memory of a message is used again
HEADS, HEAD_DIM, WINDOW = (16, 8), 64, 300
STARTS = (0, 3, 200, 700, 701, 1500)
# Of the largest value: a few roundings of probabilities, results and gradients to bfloat16, of which one is 2^-9; in float32 sums
# of 2000 products. What comes from a wrong rank or too late is off by 1.
LIMITS = {"bfloat16": 0.03, "float32": 1e-5}


@dataclass(frozen=True)
class Case(Named):
    """One way to run an operator; `usp_4` has 4 inner ranks. `kind`: causal, documents or window."""

    world_size: int
    strategy: str
    layout: str
    kind: str
    dtype: str = "bfloat16"
    length: int = 2000


def cases_of(world_size: int) -> list[Case]:
    """Return the cases for so many ranks."""
    plans = [
        ("ring", "zig_zag", "causal"),
        ("ring", "balanced", "documents"),
        ("ring", "contiguous", "window"),
        ("gather", "zig_zag", "causal"),
        ("gather_1", "balanced", "documents"),
        ("halo", "contiguous", "window"),
        ("ulysses", "contiguous", "causal"),
        ("ulysses", "contiguous", "documents"),
    ]
    for inner in (2, 4) if world_size == 8 else (2,):
        plans += [
            (f"usp_{inner}", "zig_zag", "causal"),
            (f"usp_{inner}", f"balanced:{inner}", "documents"),
            (f"usp_{inner}", "balanced", "documents"),
        ]
    found = [Case(world_size, *plan) for plan in plans]
    found += [Case(world_size, *plan, dtype="float32") for plan in plans if plan[0] in ("ring", "usp_2")]
    return found + [Case(world_size, *plan, length=1990) for plan in plans if plan[2] == "documents"]


@dataclass(frozen=True)
class ModelCase(Named):
    """One way to run a model; `inner` ranks exchange heads."""

    world_size: int
    model: str
    strategy: str
    layout: str = "auto"
    inner: int = 0


def model_cases_of(world_size: int) -> list[ModelCase]:
    """Return the cases of models for so many ranks."""
    found = [
        ModelCase(world_size, "llama", "ring", "zig_zag"),
        ModelCase(world_size, "llama", "gather", "contiguous"),
        ModelCase(world_size, "llama", "ulysses"),
        ModelCase(world_size, "packed", "ring", "balanced"),
        ModelCase(world_size, "packed", "auto"),
        ModelCase(world_size, "mixer", "auto"),
    ]
    for inner in (2, 4) if world_size == 8 else (2,):
        found += [ModelCase(world_size, model, "usp", inner=inner) for model in ("llama", "packed")]
    return found


WORLD_SIZES = (4, 8)
CASES = {world_size: cases_of(world_size) for world_size in WORLD_SIZES}
MODEL_CASES = {world_size: model_cases_of(world_size) for world_size in WORLD_SIZES}
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[torch.nn.Module], dict[str, Any]]]] = {
    "llama": (lambda: llama(**SIZES), lambda model: {str(n): batch(model, n) for n in (256, 301)}),
    "mixer": (lambda: Mixer(256), lambda model: {str(n): batch(model, n) for n in (256, 301)}),
    "packed": (PackedLM, lambda model: {mix: packed_batch(mix, 1) for mix in ("off_edges", "giant", "fifty")}),
}


def attention(case: Case, tensors: list[torch.Tensor], groups: dict[str, Any] | None) -> list[torch.Tensor]:
    """Return (out, dq, dk, dv) of this rank's rows; the last of the tensors is dout. Without groups: of all rows."""
    *leaves, dout = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    documents = bounds = None
    if case.kind == "documents":
        ends = torch.tensor([*STARTS[1:], case.length], device=dout.device)
        documents = torch.bucketize(torch.arange(case.length, device=dout.device), ends, right=True)[None]
        bounds = torch.ops.cpcompile.document_bounds(documents)
    window = WINDOW if case.kind == "window" else 0
    terms = (None, documents, None, HEAD_DIM**-0.5, True, window, 0.0)
    if groups is None:
        out = torch.ops.cpcompile.attention(*leaves, *terms)
    else:
        family, _, number = case.strategy.partition("_")
        operator = getattr(torch.ops.cpcompile, f"{family}_attention")
        axis = {"length": case.length, "layout": case.layout, "world_size": case.world_size, "group": groups["all"]}
        if family == "usp":
            axis |= {"inner_size": int(number), **groups[number]}
        elif number:
            axis |= {"heads_per_message": int(number)}
        out = operator(*leaves, *terms, bounds=bounds, **axis)[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def error_of(case: Case, rank: int, seed: int, groups: dict[str, Any], device: torch.device) -> float:
    """Return the largest error of this rank's rows, in units of the largest value."""
    generator = torch.Generator().manual_seed(seed)
    heads = HEADS[0], HEADS[1], HEADS[1], HEADS[0]
    whole = [torch.randn(1, h, case.length, HEAD_DIM, generator=generator).to(device) for h in heads]
    whole = [x.to(getattr(torch, case.dtype)) for x in whole]
    bounds = torch.tensor([[len(STARTS), *STARTS]]) if case.kind == "documents" else None
    at = TokenOrder.of(case.length, case.world_size, case.layout, bounds).positions(rank).to(device)
    found = attention(case, [x.index_select(2, at.clamp(max=case.length - 1)) for x in whole], groups)
    expected = attention(case, [x.double() for x in whole], None)
    held = at < case.length
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        assert not x[:, :, ~held].any(), "padding"
        off = (x[:, :, held].double() - y[:, :, at[held]]).abs().max() / y.abs().max()
        worst = max(worst, off.nan_to_num(nan=torch.inf).item())
    return worst


def meshes_of(world_size: int) -> dict[int, DeviceMesh]:
    """Return the ranks as one axis, and as grids of so many inner ranks."""
    found = {0: dist.init_device_mesh("cuda", (world_size,), mesh_dim_names=("cp",))}
    for inner in (2, 4):
        shape = world_size // inner, inner
        found[inner] = dist.init_device_mesh("cuda", shape, mesh_dim_names=("outer", "inner"))
    return found


def run_model(case: ModelCase, mesh: DeviceMesh) -> Result:
    """Return the errors of a model in float32, in which they would show soonest."""
    build, batches = MODELS[case.model]
    options = {"strategy": case.strategy, "balancer": case.layout, "inner": "eager"}
    if case.inner:
        options["axis"] = ("outer", "inner")  # type: ignore[assignment]
    return model_errors(build, "float32", batches(build()), mesh, **options)


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases on one rank."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    meshes = meshes_of(world_size)
    groups: dict[str, Any] = {"all": str(dist.group.WORLD.group_name)}
    for inner, mesh in meshes.items():
        names = ("inner", "outer") if inner else ()
        groups[str(inner)] = {f"{name}_group": mesh[name].get_group().group_name for name in names}

    def run(case: Case) -> Result:
        errors = [error_of(case, rank, seed, groups, device) for seed in range(NUM_RUNS)]
        return {"errors": errors, "transport": transport.transport_of(groups["all"])}

    run_cases(CASES[world_size], rank, folder, run)
    run_cases(MODEL_CASES[world_size], rank, folder, lambda case: run_model(case, meshes[case.inner]))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders() -> Iterator[dict[int, Path]]:
    """Results of all cases by the number of ranks, run once."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        patch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it is not used
        for world_size in WORLD_SIZES:
            Path(path, str(world_size)).mkdir()
            run_ranks(work, world_size, f"{path}/{world_size}", LIMIT)
        yield {world_size: Path(path, str(world_size)) for world_size in WORLD_SIZES}


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_equals_one_device(folders: dict[int, Path], case: Case) -> None:
    ranks = results_of(case, case.world_size, folders[case.world_size])
    worst = max(max(result["errors"]) for result in ranks)
    print(f"{case}: {worst:.1e} in {ranks[0]['seconds']:.1f} s")
    assert all(result["transport"] == "symmetric" for result in ranks) or case.strategy.startswith("usp")
    assert worst < LIMITS[case.dtype]


@pytest.mark.parametrize("case", [case for cases in MODEL_CASES.values() for case in cases], ids=str)
def test_models_equal_one_device(folders: dict[int, Path], case: ModelCase) -> None:
    for rank, result in enumerate(results_of(case, case.world_size, folders[case.world_size])):
        print(f"{case} rank {rank}: {result}")
        assert result["graphs"] == 1, "one graph serves all lengths"
        check(result)
