"""Output file: whether a file that a command is to write can be written, told before the work is done."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpcompile.errors import ConfigError, StorageError


def check_output(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file whose suffix says something else than what is written, or that cannot be written where it is to be.

    Raises:
        ConfigError: one of both.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} {path}: the suffix says what is written, and is one of {', '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist.")
    if path.is_dir():
        raise ConfigError(f"{option} {path}: this is a folder; name a file.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option} {path}: you may not write there; name a file in a folder of your own.")


@contextlib.contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Say of a file that cannot be written which it is, and why.

    Raises:
        StorageError: from the error of the system.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{option} {path}: this file cannot be written: {error.strerror or error}.") from error
