"""Fully sharded training (FSDP2) beside context parallelism, in a plain loop.

    python examples/fsdp2.py                          # 2 processes on the CPU
    python examples/fsdp2.py --ranks 4 --data 2       # 2 data-parallel groups of 2 ranks that share each sequence
    torchrun --nproc-per-node 4 examples/fsdp2.py --data 2

Each data-parallel group has a batch of its own, and the ranks of a group pass the same whole batch. Parameters, gradients and
optimizer state are sharded over all ranks. The same steps are taken by the untouched model on one device; exits with 1 if the
losses or the weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import cpcompile

VOCABULARY, LENGTH, LARGEST = 128, 61, 1e-5


def new_model() -> LlamaForCausalLM:
    """Return a small Llama with the same weights in every process."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, use_cache=False, **sizes))


def batch(step: int, group: int) -> dict[str, torch.Tensor]:
    """Return the batch of a data-parallel group."""
    generator = torch.Generator().manual_seed(1000 * group + step)
    ids = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
    return {"input_ids": ids, "labels": ids}


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return what trains a model."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(steps: int, data: int) -> float:
    """Train on these ranks, and on one device; returns the largest difference of losses and weights."""
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("dp", "cp"))
    every_rank = mesh["dp", "cp"]._flatten("dp_cp")

    # --- the program: FSDP2 as always, over data- and context-parallel ranks, and one more line
    model = new_model()
    for layer in model.model.layers:
        fully_shard(layer, mesh=every_rank)
    fully_shard(model, mesh=every_rank)
    cpcompile.apply(model, mesh, axis="cp", inner="aot_eager")
    optimizer = optimizer_of(model)
    losses = []
    for step in range(steps):
        loss = model(**batch(step, mesh["dp"].get_local_rank())).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # ---

    alone, expected = new_model(), []
    optimizer = optimizer_of(alone)
    for step in range(steps):
        of_groups = [alone(**batch(step, group)).loss for group in range(data)]
        (sum(of_groups) / data).backward()
        torch.nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(of_groups[mesh["dp"].get_local_rank()]))
    whole = {name: x.full_tensor() for name, x in model.named_parameters() if isinstance(x, DTensor)}
    weights = max(float((whole[name] - x).abs().max()) for name, x in alone.named_parameters())
    difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if dist.get_rank() == 0:
        print(f"ranks:      {' '.join(f'{x:.5f}' for x in losses[:4])} ... {losses[-1]:.5f}")
        print(f"one device: {' '.join(f'{x:.5f}' for x in expected[:4])} ... {expected[-1]:.5f}")
        print(f"after {steps} steps losses differ by {difference:.1e}, weights by {weights:.1e}")
    return max(difference, weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--data", type=int, default=1, help="data-parallel groups")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(options.ranks),
        ]
        sys.exit(subprocess.run([*launcher, __file__, *sys.argv[1:]]).returncode)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    difference = train(options.steps, options.data)
    dist.destroy_process_group()
    sys.exit(int(difference > LARGEST))


if __name__ == "__main__":
    main()
