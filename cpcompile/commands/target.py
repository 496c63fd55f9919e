"""Targets: the model and the inputs that a command is given by name."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cpcompile.errors import ConfigError, CPError
from cpcompile.train.model import find_model, load_model


def load_target(
    target: str, length: int, batch_size: int, seed: int = 0, is_length_asked: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model and its inputs.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory, or a model whose inputs are unknown; the factory
            fails, or makes inputs of its own length although the user asked for one.
    """
    torch.manual_seed(seed)
    taken: dict[str, int] = {}
    if Path(target).exists():
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
    vocabulary = getattr(getattr(made, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(f"{target}: the inputs of this model are unknown; let the factory return (model, inputs).")
    tokens = torch.randint(0, vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed))
    return made, {"input_ids": tokens, "labels": tokens}


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
