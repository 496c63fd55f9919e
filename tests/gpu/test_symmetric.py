"""Messages in symmetric memory and messages sent by NCCL, on two GPUs: attention is that of one device with both.

    python -m pytest tests/gpu/test_symmetric.py -m gpu

Each case runs an operator forward and backward 50 times on changing inputs, without waiting for the GPUs in between, while
delays on both streams pull the ranks apart: a message overwritten too early shows as an error of the size of the values.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cpcompile.runtime  # noqa: F401  registers the operators
from cpcompile.balance.layout import positions
from cpcompile.runtime.transport import choice as transport
from cpcompile.runtime.transport.symmetric import CudaDevice, Device, Event, Memory
from tests.gpu.jobs import Named, results_of, run_cases, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

WORLD_SIZE, LIMIT = 2, 360.0  # seconds for all cases together
NUM_RUNS, NUM_INPUTS = 50, 7
LENGTH, HEADS, HEAD_DIM, WINDOW = 1000, (4, 2), 64, 100
STRATEGIES = ("ring", "gather", "gather_1", "halo", "ulysses")
LIMITS = {"bfloat16": 0.05, "float32": 0.01}  # of the largest value; what is overwritten too early is off by 1


@dataclass(frozen=True)
class Case(Named):
    """One way to run an operator; `kind`: runs in a row, a CUDA graph, or runs without barriers, which must go wrong."""

    strategy: str
    dtype: str
    transport: str
    kind: str = "runs"


CASES = [
    *(Case(s, d, t) for s in STRATEGIES for d in LIMITS for t in ("auto", "p2p")),
    *(Case(s, "bfloat16", "symmetric", "graph") for s in STRATEGIES),
    Case("gather", "float32", "symmetric", "no_barrier"),
]


class WithoutBarriers:
    """Memory whose barriers are left out."""

    def __init__(self, memory: Memory) -> None:
        self.of = memory.of

    def barrier(self) -> None:
        pass


class LateGpu:
    """A GPU whose side stream is up to 0.2 ms late, the current one up to 0.1 ms."""

    def __init__(self, device: Device, seed: int, has_barriers: bool) -> None:
        self._device, self._random, self._has_barriers = device, random.Random(seed), has_barriers
        self.is_capturing = device.is_capturing

    def memory(self, num_bytes: int, group: str) -> Any:
        memory = self._device.memory(num_bytes, group)
        return memory if self._has_barriers else WithoutBarriers(memory)

    def aside(self, work: Callable[[], None]) -> Event:
        def late() -> None:
            torch.cuda._sleep(self._random.randrange(400_000))
            work()

        torch.cuda._sleep(self._random.randrange(200_000))
        return self._device.aside(late)


def attention(strategy: str, tensors: list[torch.Tensor], group: str) -> list[torch.Tensor]:
    """Return (out, dq, dk, dv) of this rank's rows; the last of the tensors is dout. Without a group: of all rows."""
    *leaves, dout = tensors
    leaves = [x.requires_grad_() for x in leaves]
    window = WINDOW if strategy == "halo" else 0
    terms = (None, None, None, HEAD_DIM**-0.5, True, window, 0.0)
    if not group:
        out = torch.ops.cpcompile.attention(*leaves, *terms)
    else:
        family, _, number = strategy.partition("_")
        operator = getattr(torch.ops.cpcompile, f"{family}_attention")
        axis = {"length": LENGTH, "layout": "zig_zag", "world_size": WORLD_SIZE, "group": group}
        out = operator(*leaves, *terms, **axis, **({"heads_per_message": int(number)} if number else {}))[0]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def inputs_of(case: Case, rank: int, device: torch.device) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Return inputs [q, k, v, dout] of this rank, and what it should find for each, both in its slots."""
    at = positions(LENGTH, rank, WORLD_SIZE, "zig_zag").to(device)
    inputs, expected = [], []
    for seed in range(NUM_INPUTS):
        generator = torch.Generator().manual_seed(seed)
        heads = HEADS[0], HEADS[1], HEADS[1], HEADS[0]
        whole = [torch.randn(1, h, LENGTH, HEAD_DIM, generator=generator).to(device) for h in heads]
        whole = [x.to(getattr(torch, case.dtype)) for x in whole]
        found = attention(case.strategy, [x.double() for x in whole], "")
        for into, tensors in ((inputs, whole), (expected, found)):
            into.append([x.detach().index_select(2, at.clamp(max=LENGTH - 1)) for x in tensors])
    assert int((at >= LENGTH).sum()) == 0, "every slot holds a token"
    return inputs, expected


def error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest error, in units of the largest value."""
    pairs = zip(found, expected, strict=True)
    return max(((x.double() - y).abs().max() / y.abs().max()).nan_to_num(nan=torch.inf).item() for x, y in pairs)


def in_a_row(case: Case, inputs: list[list[torch.Tensor]], group: str) -> list[list[torch.Tensor]]:
    """Return what each of the runs finds."""
    return [attention(case.strategy, list(inputs[i % NUM_INPUTS]), group) for i in range(NUM_RUNS)]


def in_a_graph(case: Case, inputs: list[list[torch.Tensor]], group: str) -> list[list[torch.Tensor]]:
    """Return the same of replays of a CUDA graph, every third run as it is."""
    held = [x.clone() for x in inputs[0]]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            attention(case.strategy, held, group)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads watch over NCCL meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = attention(case.strategy, held, group)
    found = []
    for i in range(NUM_RUNS):
        if i % 3 == 2:
            found.append(attention(case.strategy, list(inputs[i % NUM_INPUTS]), group))
            continue
        with torch.no_grad():
            for to, x in zip(held, inputs[i % NUM_INPUTS], strict=True):
                to.copy_(x)
        graph.replay()
        found.append([x.clone() for x in results])
    return found


def run_case(case: Case, rank: int, device: torch.device, make: Callable[[torch.device], Device]) -> dict[str, Any]:
    """Return the error of each run."""
    group = str(dist.group.WORLD.group_name)
    transport.DEVICES[device.type] = lambda d: LateGpu(make(d), rank, has_barriers=case.kind != "no_barrier")
    transport.set_transport(group, case.transport)
    inputs, expected = inputs_of(case, rank, device)
    found = (in_a_graph if case.kind == "graph" else in_a_row)(case, inputs, group)
    errors = [error(x, expected[i % NUM_INPUTS]) for i, x in enumerate(found)]
    return {"transport": transport.transport_of(group), "errors": errors}


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases on one rank."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl",
        store=dist.FileStore(f"{folder}/store", world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=120),
        device_id=device,
    )
    run_cases(CASES, rank, folder, lambda case: run_case(case, rank, device, CudaDevice))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Results of all cases, run once."""
    if torch.cuda.device_count() < WORLD_SIZE:
        pytest.skip(f"needs {WORLD_SIZE} GPUs")
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # it is not used
        run_ranks(work, WORLD_SIZE, path, LIMIT)
        yield Path(path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_one_device(folder: Path, case: Case) -> None:
    worst = []
    for rank, result in enumerate(results_of(case, WORLD_SIZE, folder)):
        assert result["transport"] == ("p2p" if case.transport == "p2p" else "symmetric")
        assert len(result["errors"]) == NUM_RUNS
        worst.append(max(result["errors"]))
        print(f"{case} rank {rank}: {worst[-1]:.1e} in {result['seconds']:.1f} s")
    if case.kind == "no_barrier":
        assert max(worst) > 0.1, "runs without barriers should have shown wrong messages"
    else:
        assert max(worst) < LIMITS[case.dtype]
