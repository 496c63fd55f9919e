"""Tracking: the numbers of each step, for TensorBoard, Weights & Biases and trackio. Each is optional."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from cpcompile.errors import StorageError
from cpcompile.train.options import TrainOptions


class Tracker(Protocol):
    """Takes the numbers of each step."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of one step."""

    def finish(self, exit_code: int) -> None:
        """Write what is left; 0 says that the run came to its end."""


class TensorBoard:
    """Event files in `tensorboard` of the folder of checkpoints, or in `runs` of the working directory."""

    def __init__(self, options: TrainOptions, step: int) -> None:
        module = importlib.import_module("torch.utils.tensorboard")
        folder = options.save / "tensorboard" if options.save is not None else None
        # Steps after the checkpoint are taken again.
        self.writer = module.SummaryWriter(folder, purge_step=step + 1 if step else None)
        self.writer.add_text("options", "  \n".join(f"{name}: {value}" for name, value in plain(options).items()), step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of one step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self, exit_code: int) -> None:
        """Close the files."""
        self.writer.close()


class Online:
    """A run of Weights & Biases, or of trackio, which has the same functions."""

    def __init__(self, name: str, options: TrainOptions) -> None:
        self.name, self.module = name, importlib.import_module(name)
        project = os.environ.get(f"{name.upper()}_PROJECT", "cpcompile")
        self.module.init(project=project, config=plain(options))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send the numbers of one step."""
        self.module.log(dict(values), step=step)

    def finish(self, exit_code: int) -> None:
        """Send what is left."""
        self.module.finish(**({"exit_code": exit_code} if self.name == "wandb" else {}))


def plain(options: TrainOptions) -> dict[str, Any]:
    """Return the options as numbers and text."""
    fields = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: value if isinstance(value, bool | int | float) else str(value) for name, value in fields.items()}


def open_tracker(options: TrainOptions, step: int = 0) -> Tracker | None:
    """Return what takes the numbers of the steps after `step`, or None. Raises `StorageError`."""
    if options.report_to == "none":
        return None
    with tracking_errors(options.report_to):
        return TensorBoard(options, step) if options.report_to == "tensorboard" else Online(options.report_to, options)


@contextlib.contextmanager
def tracking_errors(name: str) -> Iterator[None]:
    """Say of any error that it is one of the tracker: each package has its own."""
    try:
        yield
    except Exception as error:
        raise StorageError(f"--report-to {name} failed: {type(error).__name__}: {error}") from error
