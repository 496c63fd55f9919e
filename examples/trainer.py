"""transformers' Trainer, context parallel by one more line: accumulation, warm-up, clipping, evaluation with metrics.

    python examples/trainer.py                          # 2 processes on the CPU
    python examples/trainer.py --ranks 4 --data 2       # 2 groups, each with batches of its own
    torchrun --nproc-per-node 2 examples/trainer.py

The same script trains on one device without that line; exits with 1 if losses, metrics or weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import numpy as np
import torch
from one_device import Trained, compare
from torch.distributed.device_mesh import init_device_mesh
from transformers import EvalPrediction, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import cpcompile.integrations.transformers

LENGTH, ROWS, ACCUMULATED = 45, 2, 2


def rows(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return random rows, of which a part has labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(128, (count, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    return [{"input_ids": a, "labels": b} for a, b in zip(ids, labels, strict=True)]


def metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return numbers that depend on the logits of each token."""
    logits = np.asarray(prediction.predictions)
    return {"rows": float(len(logits)), "mean_of_largest": float(logits.max(-1).mean())}


def train(options: argparse.Namespace) -> Trained:
    """Train for some steps, and evaluate at the end."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **sizes))
    together = options.data if options.alone else 1
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=ROWS * together,
            per_device_eval_batch_size=ROWS * together,
            gradient_accumulation_steps=ACCUMULATED,
            learning_rate=0.1,
            optim="sgd",
            warmup_steps=2,
            logging_steps=1,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows(48, 1),  # type: ignore[arg-type]
            eval_dataset=rows(5, 2),  # type: ignore[arg-type]
            compute_metrics=metrics,
        )
        if not options.alone:
            ranks = arguments.world_size
            mesh = init_device_mesh("cpu", (options.data, ranks // options.data), mesh_dim_names=("dp", "cp"))
            cpcompile.integrations.transformers.apply(trainer, mesh, axis="cp", inner="eager")
        trainer.train()
        found = trainer.evaluate()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    evaluated = {name: torch.tensor(found[f"eval_{name}"]) for name in ("loss", "rows", "mean_of_largest")}
    return losses, {name: x.detach() for name, x in model.named_parameters()} | evaluated


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
