"""Adapters of PEFT on a frozen model, in a plain loop with DDP: two more lines for context parallelism.

    python examples/peft_lora.py                          # 2 processes on the CPU
    python examples/peft_lora.py --ranks 4 --data 2       # 2 groups, each with batches of its own
    torchrun --nproc-per-node 2 examples/peft_lora.py

The same script trains on one device without them; exits with 1 if losses or adapters differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys

import torch
import torch.distributed as dist
from one_device import Trained, compare
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import cpcompile

LENGTH, ROWS = 45, 2


def train(options: argparse.Namespace) -> Trained:
    """Train the adapters for some steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **sizes))
    adapters = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = wrapped = get_peft_model(base, adapters)
    rows = torch.randint(128, (options.steps * ROWS * options.data, LENGTH))
    together, rank, replicas = options.data if options.alone else 1, 0, 1
    if not options.alone:
        dist.init_process_group("gloo")
        mesh = init_device_mesh(
            "cpu", (options.data, dist.get_world_size() // options.data), mesh_dim_names=("dp", "cp")
        )
        rank, replicas = cpcompile.rank_and_replicas(mesh, "cp")
        cpcompile.apply(model.get_base_model(), mesh, axis="cp", grad_sync="mean", inner="eager")
        wrapped = DistributedDataParallel(model)
    sampler = DistributedSampler(rows, num_replicas=replicas, rank=rank, shuffle=False)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for ids in DataLoader(rows, batch_size=ROWS * together, sampler=sampler):  # type: ignore[arg-type]
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if not options.alone:
            dist.all_reduce(mean, dist.ReduceOp.SUM)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses, {name: x.detach() for name, x in model.named_parameters() if x.requires_grad}


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
