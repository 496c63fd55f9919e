"""The record of messages on GPUs: ranks record the same, whatever carries the messages.

python -m pytest tests/gpu/test_record.py -m gpu
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from cpcompile.front.message_comparison import compare_messages
from cpcompile.runtime import record
from tests.gpu.jobs import Named, Result, results_of, run_cases, run_ranks
from tests.models import batch, llama, loss_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

WORLD_SIZE, LIMIT = 2, 240.0  # seconds for all cases together
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}


@dataclass(frozen=True)
class Case(Named):
    """What carries the messages, and what compiles the program."""

    transport: str
    inner: str
    mode: str = ""


CASES = [
    Case("p2p", "eager"),
    Case("symmetric", "eager"),
    Case("auto", "inductor"),
    Case("auto", "inductor", "reduce-overhead"),
]


def test_the_gpu_ends_after_the_host() -> None:
    """On one GPU: an operator is launched until the GPU has come to its end, also while a graph is captured."""
    x = torch.zeros(1, device="cuda")

    def wait() -> None:
        torch.cuda._sleep(2_000_000_000)  # cycles: about a second

    record.call("all_reduce", "alone", x, "", wait, (), {})
    assert cpcompile.last_messages(1)[0].state == "launched"
    torch.cuda.synchronize()
    assert cpcompile.last_messages(1)[0].state == "done"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        record.call("all_reduce", "alone", x, "", x.add_, (1,), {})
    graph.replay()
    torch.cuda.synchronize()
    assert x.item() == 1.0
    assert cpcompile.last_messages(1)[0].state == "launched"  # not known


def run_case(case: Case, mesh: DeviceMesh) -> Result:
    """Run three steps, and return what was recorded in the last."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama(**SIZES).to("cuda", torch.bfloat16)
    inputs = {name: x.cuda() for name, x in batch(model, 256).items()}
    options = {"mode": case.mode, "dynamic": False} if case.mode else {}
    cpcompile.apply(model, mesh, strategy="ring", transport=case.transport, inner=case.inner, **options)
    for _ in range(2):
        loss_of(model(**inputs)).backward()
    torch.cuda.synchronize()
    before = cpcompile.last_messages(1)[0].number
    told: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(told, cpcompile.last_messages(8), group=mesh.get_group())
    said = compare_messages(dict(enumerate(told)))
    loss_of(model(**inputs)).backward()
    torch.cuda.synchronize()
    messages = [m for m in cpcompile.last_messages() if m.number > before]
    return {"said": said, "messages": [(m.number, m.operator, m.layer, m.is_backward, m.state) for m in messages]}


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases on one rank."""
    torch.cuda.set_device(rank)
    store = dist.FileStore(f"{folder}/store", world_size)
    limit, device = timedelta(seconds=60), torch.device("cuda", rank)
    dist.init_process_group("nccl", store=store, rank=rank, world_size=world_size, timeout=limit, device_id=device)
    mesh = init_device_mesh("cuda", (world_size,), mesh_dim_names=("cp",))
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
def test_ranks_record_the_same(folder: Path, case: Case) -> None:
    first, second = results_of(case, WORLD_SIZE, folder)
    assert first["messages"] == second["messages"]
    assert first["said"].startswith("no rank is behind")
    if case.mode:  # a CUDA graph replays the operators, of which none is recorded
        return
    layers = [f"model.layers.{i}.self_attn" for i in range(2)]
    attentions = [tuple(m[1:4]) for m in first["messages"] if "attention" in m[1]]
    assert attentions == [
        *(("ring_attention", layer, False) for layer in layers),
        *(("ring_attention_backward", layer, True) for layer in reversed(layers)),
    ]
    assert {m[4] for m in first["messages"] if "attention" in m[1]} == {"done"}
