"""A tiny causal language model with a tokenizer, as a transformers folder, and options that train it in seconds."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from cpcompile.train import TrainOptions

SENTENCE = "The quick brown fox jumps over the lazy dog, again and again. "


def save_tiny_llama(folder: Path) -> Path:
    """Write a Llama of two layers and a tokenizer of bytes into `folder`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_options(folder: Path, **changes: Any) -> TrainOptions:
    """Return options for four steps of the tiny model on a text in `folder`; both are made when they are not there."""
    model, text = folder / "tiny", folder / "text.txt"
    if not model.exists():
        save_tiny_llama(model)
        text.write_text("".join(f"{number}: {SENTENCE}" for number in range(40)))
    options = {
        "model": model,
        "text": (text,),
        "steps": 4,
        "length": 65,
        "learning_rate": 1e-3,
        "device": "cpu",
        "inner": "eager",
    }
    return TrainOptions(**{**options, **changes})
