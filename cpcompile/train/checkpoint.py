"""Checkpoints: written beside the old ones, flushed to disk, then renamed, so that a crash at any moment loses none."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cpcompile.errors import InputError

KEEP = 2
_NAME = re.compile(r"checkpoint-(\d+)\.pt")


def find(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all complete checkpoints, oldest first."""
    paths = folder.glob("checkpoint-*.pt") if folder.is_dir() else ()
    return sorted((int(match[1]), path) for path in paths if (match := _NAME.fullmatch(path.name)))


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `state` as the checkpoint of `step`, and keep the `KEEP` newest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{step:06d}.pt"
    partial = path.with_suffix(".pt.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(folder)
    for _, old in find(folder)[:-KEEP]:
        old.unlink()
    # Left by runs that were killed while writing.
    for stale in folder.glob("checkpoint-*.pt.partial"):
        stale.unlink()
    return path


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(folder: Path) -> tuple[dict[str, Any], Path, list[Path]]:
    """Return the newest checkpoint that reads whole, its path, and newer ones that do not."""
    damaged: list[Path] = []
    for _, path in reversed(find(folder)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True), path, damaged
        except (RuntimeError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError):
            damaged.append(path)
    raise InputError(
        f"no checkpoint in {folder} can be read: {', '.join(path.name for path in damaged) or 'none there'}."
    )


def check_same_job(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to resume a run with other settings than it began with: its loss curve would not continue."""
    changed = [
        f"{name} was {saved.get(name)!r} and is {value!r}" for name, value in wanted.items() if saved.get(name) != value
    ]
    if changed:
        raise InputError(f"{path.name} belongs to another run: {'; '.join(changed)}.")
