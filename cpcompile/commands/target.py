"""Target: the model that a command is about, and its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cpcompile.errors import ConfigError

Target = Annotated[
    str, typer.Argument(help="A transformers model folder, or module:factory that returns a model or (model, inputs).")
]
WorldSize = Annotated[int, typer.Option(min=1, help="Ranks that share the sequence.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of one sequence, over all ranks.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of one step.")]
InnerSize = Annotated[
    int, typer.Option(min=0, help="How many of the ranks exchange heads in usp; 0: they are no grid.")
]


def shape_of(target: str, length: int, batch_size: int) -> tuple[Any, Mapping[str, Any]]:
    """Return a model without memory and its inputs: of a folder its configuration alone is read.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory.
    """
    if not Path(target).exists():
        return loaded(target, length, batch_size)
    transformers = imported("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target}: no model of transformers: {error}") from error
    config.use_cache = False
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model, inputs_of(model, target, length, batch_size)


def loaded(target: str, length: int, batch_size: int) -> tuple[Any, Mapping[str, Any]]:
    """Return a model with its weights, and its inputs.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory.
    """
    path = Path(target)
    if path.exists():
        imported("transformers", "train")
        from cpcompile.train.model import find_model, load_model

        made: Any = load_model(find_model(path), torch.float32, torch.device("cpu"))
    elif ":" in target:
        made = call_factory(target)
    else:
        raise ConfigError(f"{target}: neither a model folder nor module:factory.")
    if isinstance(made, tuple):
        model, inputs = made
        return model, inputs
    return made, inputs_of(made, target, length, batch_size)


def inputs_of(model: Any, target: str, length: int, batch_size: int) -> Mapping[str, Any]:
    """Return random tokens and the labels of a language model."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(f"{target}: the inputs of this model are unknown; let the factory return (model, inputs).")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch_size, length), generator=generator, device="cpu")
    tokens = tokens.to(next(iter(model.parameters())).device)
    return {"input_ids": tokens, "labels": tokens}


def call_factory(target: str) -> Any:
    """Return what `module:factory` returns; modules of the current folder are found."""
    module_name, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{target}: {error}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{target}: {module_name} has no function {name!r}.")
    return factory()


def imported(package: str, extra: str) -> Any:
    """Return a package that an extra installs.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(f"this needs {package}, which is not installed: pip install 'cpcompile[{extra}]'.") from error
