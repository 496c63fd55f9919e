"""A plain loop with accelerate, context parallel by one more line: accumulation, clipping and a shuffled loader as always.

    python examples/accelerate_loop.py                          # 2 processes on the CPU
    python examples/accelerate_loop.py --ranks 4 --data 2       # 2 groups, each with batches of its own
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

The same script trains on one device without that line; exits with 1 if losses or weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys

import torch
from accelerate import Accelerator
from one_device import Trained, compare
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import cpcompile.integrations.accelerate

LENGTH, ROWS, ACCUMULATED = 45, 2, 2


def train(options: argparse.Namespace) -> Trained:
    """Train for some steps, each of two batches."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **sizes))
    rows = torch.randint(128, (options.steps * ROWS * ACCUMULATED * options.data, LENGTH))
    together = options.data if options.alone else 1
    loader = DataLoader(rows, batch_size=ROWS * together, shuffle=True, generator=torch.Generator())  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    if not options.alone:
        mesh = init_device_mesh(
            "cpu", (options.data, accelerator.num_processes // options.data), mesh_dim_names=("dp", "cp")
        )
        cpcompile.integrations.accelerate.apply(accelerator, model, mesh, axis="cp", inner="eager")
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses: list[float] = []
    for ids in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
    return losses, accelerator.get_state_dict(wrapped)


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
