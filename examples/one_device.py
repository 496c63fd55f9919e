"""What the examples for training frameworks share: the same script on one device, untouched, and the comparison."""

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

LARGEST = 1e-5
Trained = tuple[list[float], dict[str, torch.Tensor]]  # losses, and weights at the end


def compare(train: Callable[[argparse.Namespace], Trained], description: str | None) -> int:
    """Train on ranks and on one device; return 1 if losses or weights differ.

    `train` is given `options`: with `options.alone` it trains the untouched model, by batches as large as those of all groups.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes to start, without torchrun")
    parser.add_argument("--data", type=int, default=1, help="data-parallel groups")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--alone", type=Path, help="train on one device, and write the result there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        torch.save(train(options), options.alone)
        return 0
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        return subprocess.run([sys.executable, *launcher, *sys.argv]).returncode
    losses, weights = train(options)
    found = 0.0
    if dist.get_rank() == 0:
        expected, alone = of_one_device()
        of_losses = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        of_weights = max(float((weights[name] - x).abs().max()) for name, x in alone.items())
        found = max(of_losses, of_weights)
        print(f"ranks:      {' '.join(f'{x:.5f}' for x in losses[:4])} ... {losses[-1]:.5f}")
        print(f"one device: {' '.join(f'{x:.5f}' for x in expected[:4])} ... {expected[-1]:.5f}")
        print(f"after {len(losses)} steps losses differ by {of_losses:.1e}, weights by {of_weights:.1e}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(not found <= LARGEST)


def of_one_device() -> Trained:
    """Run this script once more, in a process that knows of no ranks."""
    apart = {name: x for name, x in os.environ.items() if not name.startswith(("TORCHELASTIC", "MASTER_", "GROUP_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        apart.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "alone.pt"
        subprocess.run([sys.executable, *sys.argv, "--alone", str(file)], env=apart, check=True)
        losses, weights = torch.load(file)
    return losses, weights
