"""TRL's SFTTrainer on packed documents, context parallel by one more line. TRL itself refuses packing with context parallelism.

    python examples/trl_sft_packed.py                          # 2 processes on the CPU
    python examples/trl_sft_packed.py --ranks 4 --data 2       # 2 groups, each with rows of its own
    torchrun --nproc-per-node 2 examples/trl_sft_packed.py

The same script trains on one device without that line; exits with 1 if losses or weights differ by more than 1e-5.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from datasets import Dataset
from one_device import Trained, compare
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import cpcompile.integrations.transformers

VOCABULARY, LENGTH, ROWS = 128, 60, 2


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def documents(count: int) -> Dataset:
    """Return texts of 5 to 39 words."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(5, 40, (count,), generator=generator).tolist()
    words = [torch.randint(2, VOCABULARY, (size,), generator=generator).tolist() for size in sizes]
    return Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in words]})


def train(options: argparse.Namespace) -> Trained:
    """Train for some steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            packing=True,
            max_length=LENGTH,
            max_steps=options.steps,
            per_device_train_batch_size=ROWS * (options.data if options.alone else 1),
            learning_rate=0.1,
            optim="sgd",
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = SFTTrainer(model, args=arguments, train_dataset=documents(64), processing_class=tokenizer())
        if not options.alone:
            ranks = arguments.world_size
            mesh = init_device_mesh("cpu", (options.data, ranks // options.data), mesh_dim_names=("dp", "cp"))
            cpcompile.integrations.transformers.apply(trainer, mesh, axis="cp", inner="eager")
        trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: x.detach() for name, x in model.named_parameters()}


if __name__ == "__main__":
    sys.exit(compare(train, __doc__ or ""))
