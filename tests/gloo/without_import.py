"""A user's script that names the backend and never imports cpcompile: python without_import.py FOLDER INNER WORLD_SIZE,LAYOUT ...

Each argument is one job of that many ranks, which trains a tiny model and compares it with the untouched one. All jobs have the
same process group name, and share the compiler caches of the environment. Prints the number of cache hits of each job.
"""

import copy
import datetime
import os
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.head = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, input_ids, labels):
        q, k, v = (x.unflatten(-1, (4, 4)).transpose(1, 2) for x in self.qkv(self.embed(input_ids)).chunk(3, dim=-1))
        logits = self.head(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(logits.flatten(0, 1), shifted.flatten()), logits


def train(rank, world_size, layout, inner, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    model = Model().double()
    alone = copy.deepcopy(model)
    assert "cpcompile" not in sys.modules
    options = {"mesh": mesh, "strategy": "ring", "balancer": layout, "inner": inner}
    compiled = torch.compile(model, backend="cpcompile", options=options, fullgraph=True, dynamic=True)
    for length in (31, 64):
        input_ids, labels = torch.randint(32, (2, 2, length))
        losses = []
        for module in (compiled, alone):
            losses.append(module(input_ids, labels)[0])
            losses[-1].backward()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
        for p, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p.grad, expected.grad, rtol=1e-10, atol=1e-12)
    assert "cpcompile" in sys.modules
    if rank == 0:
        hits = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
        print(f"{world_size},{layout}: {hits} cache hits", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, inner, *jobs = sys.argv[1:]
    for job in jobs:
        size, layout = job.split(",")
        mp.start_processes(train, (int(size), layout, inner, folder), nprocs=int(size), start_method="fork")
        os.unlink(f"{folder}/store")
