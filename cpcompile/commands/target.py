"""Targets: the model and the inputs that a command is given by name."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cpcompile.errors import ConfigError, CPError

if TYPE_CHECKING:
    import torch

Target = Annotated[
    str, typer.Argument(help="A transformers model folder, or module:factory that returns a model or (model, inputs).")
]
WorldSize = Annotated[int, typer.Option(min=1, help="Ranks that share the sequence.")]
DEFAULT_LENGTH = 512
Length = Annotated[
    int | None, typer.Option(min=2, help=f"Tokens of one sequence, over all ranks [default: {DEFAULT_LENGTH}]")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Sequences of one step [default: 1]")]
InnerSize = Annotated[
    int, typer.Option(min=0, help="How many of the ranks exchange heads in usp; 0: they are no grid.")
]


def shape_of(
    target: str, length: int | None, batch_size: int | None, *, of_gpus: bool = False
) -> tuple[Any, Mapping[str, Any]]:
    """Return a model and its inputs, of a folder without memory: its configuration alone is read.

    Args:
        target, length, batch_size: as `load_target` takes them.
        of_gpus: what is on the CPU is put on the meta device, since the plan is for GPUs.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory.
    """
    import torch

    if not is_folder(target):
        model, inputs = load_target(target, length, batch_size)
        is_on_cpu = all(x.device.type == "cpu" for x in model.parameters())
        if of_gpus and is_on_cpu and isinstance(inputs, Mapping):
            inputs = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            model = model.to("meta")
        return model, inputs
    transformers = imported("transformers", "train")
    try:
        config = transformers.AutoConfig.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{target}: no model of transformers: {error}") from error
    config.use_cache = False
    dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model, inputs_of(model, target, length or DEFAULT_LENGTH, batch_size or 1)


def is_folder(target: str) -> bool:
    """Tell whether a target is a path, and no `module:factory`."""
    return bool(target) and Path(target).exists()


def load_target(
    target: str, length: int | None, batch_size: int | None, seed: int = 0, *, default_length: int = DEFAULT_LENGTH
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """Return a model and its inputs.

    Args:
        target: a model folder, or `module:factory`.
        length, batch_size: of the inputs; None where the user has asked for none.
        seed: of the factory and of inputs that are drawn.
        default_length: the length where none is asked for.

    Raises:
        ConfigError: `target` names neither a model folder nor a factory, or a model whose inputs are unknown; the factory
            fails, returns something else, or makes inputs of its own size although the user asked for one.
    """
    import torch

    torch.manual_seed(seed)
    taken: dict[str, int] = {}
    asked = {"length": length, "batch_size": batch_size}
    sizes = {"length": length or default_length, "batch_size": batch_size or 1}
    if is_folder(target):
        imported("transformers", "train")
        from cpcompile.train.model import find_model, load_model

        made: Any = load_model(find_model(Path(target)), torch.float32, torch.device("cpu"))
    elif all(part for part in target.partition(":")):
        with failures_of(target):
            factory = find_factory(target)
            taken = {name: size for name, size in sizes.items() if name in inspect.signature(factory).parameters}
            made = factory(**taken)
    else:
        raise ConfigError(f"{target or repr(target)}: neither a model folder nor module:factory.")
    match made:
        case torch.nn.Module():
            return made, inputs_of(made, target, sizes["length"], sizes["batch_size"], seed)
        case (torch.nn.Module() as model, inputs):
            for name, size in asked.items():
                if size is not None and name not in taken:
                    raise ConfigError(
                        f"--{name.replace('_', '-')} {size}: {target} returns inputs of its own {name.replace('_', ' ')}; let it "
                        f"take one, def factory({name}): ..."
                    )
            return model, inputs
    kinds = ", ".join(type(x).__name__ for x in made) if isinstance(made, tuple) else type(made).__name__
    raise ConfigError(
        f"{target} returns ({kinds}): let it return a torch.nn.Module, or such a model and a dict of its inputs, (model, inputs)."
    )


@contextlib.contextmanager
def failures_of(target: str) -> Iterator[None]:
    """Show where the user's code fails, which is imported and called, from its first line on.

    Raises:
        ConfigError: it does.
    """
    try:
        yield
    except CPError:
        raise
    except (Exception, SystemExit) as error:  # a script that parses its own arguments ends itself
        inner = error.__traceback__
        while inner is not None and is_before(inner.tb_frame.f_code.co_filename):
            inner = inner.tb_next
        text = "".join(traceback.format_exception(type(error), error, inner))
        raise ConfigError(f"{target} fails:\n\n{text}") from error


def is_before(file: str) -> bool:
    """Tell whether a frame of this file is what imports and calls the user's code."""
    return file == __file__ or "importlib" in file


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
        here = [key for key, x in vars(module).items() if inspect.isfunction(x) and x.__module__ == module_name]
        meant = get_close_matches(name, here, n=1)
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        raise ConfigError(f"{target}: {module_name} has no function {name!r}.{hint}")
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
