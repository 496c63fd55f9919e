"""Output file: whether a file that a command is to write can be written, told before the work is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cpcompile.errors import ConfigError


def check_output(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse a file whose suffix says something else than what is written, or whose folder is not there.

    Raises:
        ConfigError: one of both.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"{option} {path}: the suffix says what is written, and is one of {', '.join(suffixes)}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: the folder {path.parent} does not exist.")
