"""Targets: the model and the inputs that a command is given by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from cpcompile.errors import ConfigError, CPError

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
        return load_target(target, length, batch_size)
    transformers = imported("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target}: no model of transformers: {error}") from error
    import torch

    config.use_cache = False
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, inputs_of(model, target, length, batch_size)


def load_target(
    target: str, length: int, batch_size: int, seed: int = 0, is_length_asked: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model and its inputs.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory, or a model whose inputs are unknown; the factory
            fails, or makes inputs of its own length although the user asked for one.
    """
    import torch

    torch.manual_seed(seed)
    taken: dict[str, int] = {}
    if Path(target).exists():
        imported("transformers", "train")
        from cpcompile.train.model import find_model, load_model

        made: Any = load_model(find_model(Path(target)), torch.float32, torch.device("cpu"))
    elif ":" in target:
        factory = find_factory(target)
        sizes = {"length": length, "batch_size": batch_size}
        taken = {name: size for name, size in sizes.items() if name in inspect.signature(factory).parameters}
        try:
            made = factory(**taken)
        except CPError:
            raise
        except Exception as error:
            raise ConfigError(f"{target} fails:\n\n{''.join(traceback.format_exception(error))}") from error
    else:
        raise ConfigError(f"{target}: neither a model folder nor module:factory.")
    if isinstance(made, tuple):
        model, inputs = made
        if is_length_asked and "length" not in taken:
            raise ConfigError(
                f"--length {length}: {target} returns inputs of its own length; let it take one, def factory(length): ..."
            )
        return model, inputs
    return made, inputs_of(made, target, length, batch_size, seed)


def inputs_of(model: Any, target: str, length: int, batch_size: int, seed: int = 0) -> Mapping[str, Any]:
    """Return random tokens and the labels of a language model, where its parameters are.

    Raises:
        ConfigError: it is no language model.
    """
    import torch

    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(f"{target}: the inputs of this model are unknown; let the factory return (model, inputs).")
    tokens = torch.randint(0, vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    tokens = tokens.to(next(iter(model.parameters())).device)
    return {"input_ids": tokens, "labels": tokens}


def find_factory(target: str) -> Any:
    """Return the function that `module:factory` names; modules of the current folder are found.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{target}: {error}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{target}: {module_name} has no function {name!r}.")
    return factory


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
