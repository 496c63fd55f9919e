"""Lightning, context parallel by its strategy: a LightningModule with a loss of its own, accumulation and clipping.

    python examples/lightning_module.py                          # 2 processes on the CPU
    python examples/lightning_module.py --ranks 4 --data 2       # 2 groups, each with batches of its own
    torchrun --nproc-per-node 2 examples/lightning_module.py

The same script trains on one device with the default strategy; exits with 1 if losses or weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from one_device import Trained, compare
from torch.utils.data import DataLoader, DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

import cpcompile
from cpcompile.integrations.lightning import ContextParallelStrategy

LENGTH, ROWS, ACCUMULATED = 45, 2, 2


class Language(LightningModule):
    """A small Llama."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **sizes))
        self.losses: list[float] = []

    def training_step(self, ids: torch.Tensor, index: int) -> torch.Tensor:
        """Return the loss of a batch, computed from logits that are this rank's or whole."""
        loss = cpcompile.cross_entropy(self.model(input_ids=ids).logits, ids, self.model, label_smoothing=0.1)
        self.log("loss", loss, sync_dist=True)
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)


def train(options: argparse.Namespace) -> Trained:
    """Train for some steps."""
    module = Language()
    rows = torch.randint(128, (options.steps * ROWS * ACCUMULATED * options.data, LENGTH))
    # On several ranks Lightning puts a sampler of this kind in; on one device it does not.
    sampler = DistributedSampler(rows, 1, 0) if options.alone else None  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        rows,  # type: ignore[arg-type]
        batch_size=ROWS * (options.data if options.alone else 1),
        sampler=sampler,
    )
    strategy: Any = "auto"
    devices = 1
    if not options.alone:
        devices = int(os.environ["WORLD_SIZE"])
        strategy = ContextParallelStrategy(size=devices // options.data, options={"inner": "eager"})
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        max_steps=options.steps,
        accumulate_grad_batches=ACCUMULATED,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    return module.losses, {name: x.detach() for name, x in module.model.named_parameters()}


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
