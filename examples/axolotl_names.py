"""A training script written for axolotl, with its imports changed: accelerate, data parallel groups, packed documents, windows.

    python examples/axolotl_names.py              # 4 processes: 2 groups, each of which shares its sequences between 2 ranks
    python examples/axolotl_names.py --ranks 2    # 1 group

Every process trains the model for a few steps with accelerate, and then an untouched copy, alone, on the batches of all groups.
Prints the losses of both and exits with 1 if they or the weights differ by more than rounding.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch
import transformers

# Were: from axolotl.monkeypatch.ring_attn import ..., from axolotl.utils.ctx_managers import ...
from cpcompile.compat.axolotl import RingAttnFunc, SequenceParallelContextManager, patch_accelerate

CP_SIZE, STEPS, ROWS, LARGEST = 2, 4, 2, 1e-5
DOCUMENTS = (37, 5, 1, 20)  # tokens of the documents in each row


def model() -> Any:
    """Return a small model with a sliding window, the same in every process."""
    config = transformers.MistralConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).train()


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of packed documents; the positions begin again with each."""
    generator = torch.Generator().manual_seed(1)
    positions = torch.cat([torch.arange(size) for size in DOCUMENTS])
    ids = (torch.randint(100, (count, 1), generator=generator) + torch.arange(len(positions))) % 100
    return [{"input_ids": row, "position_ids": positions, "labels": row.where(positions > 0, -100)} for row in ids]


def train(num_ranks: int) -> tuple[torch.nn.Module, list[float]]:
    """Return the model that the ranks have trained, and the losses of this rank's group."""
    patch_accelerate()  # before the Accelerator: the ranks of a group get the same batches
    from accelerate import Accelerator, ParallelismConfig

    sizes = ParallelismConfig(cp_size=CP_SIZE, dp_shard_size=num_ranks // CP_SIZE)
    accelerator, own = Accelerator(cpu=True, parallelism_config=sizes), model()
    loader = torch.utils.data.DataLoader(rows(STEPS * ROWS * sizes.dp_shard_size), batch_size=ROWS)  # type: ignore[arg-type]
    wrapped, optimizer, loader = accelerator.prepare(own, torch.optim.SGD(own.parameters(), lr=0.5), loader)
    losses = []
    with SequenceParallelContextManager(
        models=[own],
        context_parallel_size=CP_SIZE,
        gradient_accumulation_steps=1,
        ring_attn_func=RingAttnFunc.BATCH_ZIGZAG,
        heads_k_stride=None,
        gather_outputs=False,
        device_mesh=accelerator.torch_device_mesh,
    ):
        for batch in loader:
            loss = wrapped(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
    return own, losses


def train_alone(num_groups: int) -> tuple[torch.nn.Module, list[float]]:
    """Return the untouched model, trained by this process alone on the batches of all groups, and its losses."""
    alone = model()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    batches = torch.utils.data.DataLoader(rows(STEPS * ROWS * num_groups), batch_size=ROWS)  # type: ignore[arg-type]
    losses = [0.0] * STEPS
    for index, batch in enumerate(batches):
        # Without a cache, transformers keeps the documents apart.
        loss = alone(**batch, use_cache=False).loss / num_groups
        loss.backward()
        losses[index // num_groups] += loss.item()
        if index % num_groups == num_groups - 1:
            optimizer.step()
            optimizer.zero_grad()
    return alone, losses


def work() -> int:
    """Train in this process, one of those that `main` has started; return 1 if the results differ."""
    num_ranks = int(os.environ["WORLD_SIZE"])
    shared, losses = train(num_ranks)
    alone, expected = train_alone(num_ranks // CP_SIZE)
    of_loss = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    pairs = zip(shared.parameters(), alone.parameters(), strict=True)
    of_weights = max((a - b).abs().max().item() for a, b in pairs)
    if os.environ["RANK"] == "0":
        print(
            f"{num_ranks} ranks, {CP_SIZE} to a sequence of {sum(DOCUMENTS)} tokens in documents of {list(DOCUMENTS)}"
        )
        for name, values in (("ranks", losses), ("one device", expected)):
            print(f"{name:>10}: " + " ".join(f"{value:.6f}" for value in values))
        print(f"losses differ by {of_loss:.1e}, weights after {STEPS} steps by {of_weights:.1e}")
    torch.distributed.destroy_process_group()
    return int(max(of_loss, of_weights) > LARGEST)


def main() -> int:
    """Start the processes, or be one of them."""
    if "WORLD_SIZE" in os.environ:
        return work()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, choices=(2, 4, 6, 8), help="how many processes")
    ranks = parser.parse_args().ranks
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), __file__]
    return subprocess.run([sys.executable, *command], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
