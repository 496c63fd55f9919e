"""What the examples for training frameworks share: how ranks are started, and the comparison with one device."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

LARGEST = 1e-5
Trained = tuple[list[float], dict[str, torch.Tensor]]  # losses, and weights at the end
Train = Callable[[argparse.Namespace], Trained]


def compare(train: Train, description: str) -> int:
    """Train on ranks and on one device; return 1 if losses or weights differ.

    `train` is given the options. With `options.alone` it trains the untouched model, by batches as large as those of all groups.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--data", type=int, default=1, help="data-parallel groups")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alone", type=Path, help="train on one device, and write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        torch.save(train(options), options.alone)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        ranks, alone = Path(folder) / "ranks.pt", Path(folder) / "alone.pt"
        if "RANK" in os.environ:
            if not on_rank(train, options, ranks):
                return 0
            # A process that knows of no other ranks.
            apart = {name: x for name, x in os.environ.items() if "RANK" not in name and "WORLD_SIZE" not in name}
            subprocess.run([sys.executable, *sys.argv, "--alone", str(alone)], env=apart, check=True)
        else:
            # What torchrun does, but of this process, which has imported everything.
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "1"
            config = LaunchConfig(
                1, 1, options.ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork"
            )
            elastic_launch(config, on_rank)(train, options, ranks)
            options.alone = alone
            torch.save(train(options), alone)
        return differences(torch.load(ranks), torch.load(alone))


def on_rank(train: Train, options: argparse.Namespace, file: Path) -> bool:
    """Train on this rank; tell whether it is the first one, which writes the result."""
    result, is_first = train(options), dist.get_rank() == 0
    if is_first:
        torch.save(result, file)
    dist.barrier()
    dist.destroy_process_group()
    return is_first


def differences(ranks: Trained, alone: Trained) -> int:
    """Print losses and what they and the weights differ by; return 1 if that is more than rounding."""
    of_losses = max(abs(a - b) for a, b in zip(ranks[0], alone[0], strict=True))
    of_weights = max(float((ranks[1][name] - x).abs().max()) for name, x in alone[1].items())
    for name, (losses, _) in (("ranks:     ", ranks), ("one device:", alone)):
        print(f"{name} {' '.join(f'{x:.5f}' for x in losses[:4])} ... {losses[-1]:.5f}")
    print(f"after {len(alone[0])} steps losses differ by {of_losses:.1e}, weights by {of_weights:.1e}")
    return int(not max(of_losses, of_weights) <= LARGEST)
