"""Four and eight ranks that share the GPUs there are, one at least: attention is that of one device, by every strategy.

    python -m pytest tests/gpu/test_many_ranks.py -m gpu

A process for each rank, messages in symmetric memory, which torch lets ranks of one GPU share on demand. NCCL does not, so that
the hosts talk over gloo. GPUs turn from rank to rank here: this says nothing of speed.
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.order import Order
from cpcompile.runtime import transport

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

LIMIT = 300.0  # seconds for all cases of a number of ranks
NUM_RUNS = 3  # on other inputs each: the memory of a message is used again
HEADS, HEAD_DIM, WINDOW = (16, 8), 64, 300
STARTS = (0, 3, 200, 700, 701, 1500)
# Of the largest value: of bfloat16 the rounding of inputs to the kernels' products and of sums in several parts; of float32 that
# of TF32 products. What comes from a wrong rank or too late is off by 1.
LIMITS = {"bfloat16": 0.05, "float32": 0.01}


@dataclass(frozen=True)
class Case:
    """One way to run an operator; `usp_4` has 4 inner ranks. `kind`: causal, documents or window."""

    world_size: int
    strategy: str
    layout: str
    kind: str
    dtype: str = "bfloat16"
    length: int = 2000

    def __str__(self) -> str:
        return "-".join(map(str, asdict(self).values())).replace(":", "_")


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


CASES = {world_size: cases_of(world_size) for world_size in (4, 8)}


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
    at = Order.of(case.length, case.world_size, case.layout, bounds).positions(rank).to(device)
    found = attention(case, [x.index_select(2, at.clamp(max=case.length - 1)) for x in whole], groups)
    expected = attention(case, [x.double() for x in whole], None)
    held = at < case.length
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        assert not x[:, :, ~held].any(), "padding"
        off = (x[:, :, held].double() - y[:, :, at[held]]).abs().max() / y.abs().max()
        worst = max(worst, off.nan_to_num(nan=torch.inf).item())
    return worst


def grids(world_size: int) -> dict[str, dict[str, str]]:
    """Return the groups of this rank in a grid of so many inner ranks."""
    found = {}
    for inner in (2, 4):
        mesh = dist.init_device_mesh("cpu", (world_size // inner, inner), mesh_dim_names=("outer", "inner"))
        found[str(inner)] = {f"{name}_group": mesh[name].get_group().group_name for name in ("inner", "outer")}
    return found


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases on one rank; each result is on disk before the next case starts."""
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    groups: dict[str, Any] = {"all": str(dist.group.WORLD.group_name), **grids(world_size)}
    for case in CASES[world_size]:
        start = time.perf_counter()
        try:
            result: dict[str, Any] = {
                "errors": [error_of(case, rank, seed, groups, device) for seed in range(NUM_RUNS)]
            }
        except Exception:
            result = {"failed": traceback.format_exc()}
        result |= {"transport": transport.transport_of(groups["all"]), "seconds": time.perf_counter() - start}
        Path(folder, f"{case}.{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders() -> Iterator[dict[int, Path]]:
    """Results of all cases by the number of ranks, run once."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        patch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it is not used
        for world_size in CASES:
            Path(path, str(world_size)).mkdir()
            run_all(world_size, f"{path}/{world_size}")
        yield {world_size: Path(path, str(world_size)) for world_size in CASES}


def run_all(world_size: int, folder: str) -> None:
    """Run the ranks; end those that hang."""
    context = mp.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, world_size, folder)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + LIMIT
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    for process in ranks:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.mark.parametrize("case", [case for cases in CASES.values() for case in cases], ids=str)
def test_equals_one_device(folders: dict[int, Path], case: Case) -> None:
    worst = []
    for rank in range(case.world_size):
        path = folders[case.world_size] / f"{case}.{rank}.json"
        assert path.exists(), f"rank {rank} ended before this case, or hangs in it"
        result = json.loads(path.read_text())
        assert "failed" not in result, f"rank {rank}: {result['failed']}"
        worst.append(max(result["errors"]))
    print(f"{case}: {max(worst):.1e} in {result['seconds']:.1f} s")
    assert result["transport"] == "symmetric" or case.strategy.startswith("usp")
    assert max(worst) < LIMITS[case.dtype]
