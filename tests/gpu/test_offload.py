"""What waits in pinned host memory, on one GPU: copies on a stream of their own, the same gradients, and less memory.

python -m pytest tests/gpu/test_offload.py -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from tests.graph.test_memory import LAYERS, WIDTH, Stack, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(420)]

cp = torch.ops.cpcompile
LENGTH = 32768


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cuda", (1,))
    dist.destroy_process_group()


def test_copies_are_made_beside_computation_and_awaited() -> None:
    x = torch.randn(2**24, device="cuda")
    expected, work = x.clone(), torch.randn(4096, 4096, device="cuda")
    for _ in range(3):  # host memory and streams are used again
        host = cp.to_host(x, [])
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        cp.wait_copy(host, x, [work])
        x.zero_()  # as if somebody else had the memory
        x = cp.from_host(host, x.device, [host])
        cp.wait_copy(x, host, [])
        assert host.is_pinned() and torch.equal(x, expected)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_gradients_stay_and_memory_goes(mesh: DeviceMesh, inner: str) -> None:
    inputs = {name: x.cuda() for name, x in tokens(LENGTH).items()}
    found: dict[str, tuple[list[torch.Tensor], int]] = {}
    for offload in ("none", "inputs", "all"):
        torch._dynamo.reset()
        model = Stack().cuda()
        cpcompile.apply(model, mesh, inner=inner, strategy="ring", memory_budget=0.0, offload=offload)
        for _ in range(3):
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            loss = model(**inputs)
            kept = torch.cuda.memory_allocated()
            loss.backward()
        found[offload] = [p.grad.clone() for p in model.parameters() if p.grad is not None], kept
    one = LENGTH * WIDTH * 4  # what enters a block
    for offload, least in (("inputs", LAYERS - 1), ("all", 2 * (LAYERS - 1))):
        for mine, other in zip(found[offload][0], found["none"][0], strict=True):
            # Sums of 2^15 numbers in float32, in any order, are off by 2^-24 * sqrt(2^15) = 1e-5; the layers behind add theirs.
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-3 * float(other.abs().max()))
        # What else a step holds differs by a tenth of a block (23.2 MiB in place of 3 blocks of 8 MiB on an H200).
        assert found["none"][1] - found[offload][1] > (least - 0.5) * one
