"""Checkpoints: folders whose every byte a digest vouches for, written beside the old ones, flushed to disk, then renamed.

    checkpoint-000010/tensors.safetensors   all tensors, by name
    checkpoint-000010/record.json           the step, the job, names that share one tensor
    checkpoint-000010/manifest              SHA-256 of both, as `sha256sum -c manifest` reads it; written last

A crash at any moment leaves the older checkpoints as they were, and damage is found before a byte of it is used. Each rank has
all parameters, so there is nothing for `torch.distributed.checkpoint` to gather or to lay out anew, and it vouches for no bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpcompile.errors import InputError, StorageError

KEEP = 2
MANIFEST = "manifest"
FILES = ("record.json", "tensors.safetensors")
_NAME = re.compile(r"checkpoint-(\d+)")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read: tensors on the CPU by name, the record, and newer checkpoints that are damaged, with what is wrong."""

    step: int
    path: Path
    tensors: dict[str, torch.Tensor]
    record: dict[str, Any]
    damaged: dict[str, str]


def find(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of all checkpoints that were written to the end, oldest first. Raises `StorageError`."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"{folder} cannot be read: {error.strerror}.") from error
    return sorted((int(match[1]), folder / name) for name in names if (match := _NAME.fullmatch(name)))


def save(folder: Path, step: int, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step` and keep the `KEEP` newest up to it. `record` must be JSON. Raises `StorageError`."""
    path = folder / f"checkpoint-{step:06d}"
    partial = folder / f"{path.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(folder)
        partial.mkdir()
        write_files(partial, {**record, "step": step}, tensors)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one that was passed over when the run was resumed
        partial.rename(path)
        sync(folder)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(cannot_write(folder, f"the checkpoint of step {step}", error)) from error
    found = find(folder)
    kept = [old for old_step, old in found if old_step <= step][-KEEP:]
    for _, old in found:
        # Later ones were passed over as damaged: this run has left their way.
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return path


def write_files(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the files and then their manifest, each flushed to disk before the next."""
    from safetensors.torch import save_file

    distinct, shared = share(tensors)
    (folder / "record.json").write_text(json.dumps({**record, "shared": shared}), encoding="utf-8")
    save_file(distinct, folder / "tensors.safetensors")
    for name in FILES:
        sync(folder / name)
    (folder / MANIFEST).write_bytes(manifest(folder))
    sync(folder / MANIFEST)
    sync(folder)


def share(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return each tensor once, as safetensors wants it, and the name under which each of the others (tied weights) lies."""
    distinct: dict[str, torch.Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        same = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
        if same == name or not tensor.numel():
            # A copy only where a tensor is a part of a larger storage.
            is_whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            distinct[name] = tensor if is_whole else tensor.clone(memory_format=torch.contiguous_format)
        else:
            shared[name] = same
    return distinct, shared


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed while writing have left: it may be what fills the disk."""
    for stale in folder.glob("checkpoint-*.partial"):
        shutil.rmtree(stale, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def manifest(folder: Path) -> bytes:
    """Return what the manifest of `folder` has to be, from the bytes that lie there."""
    return "".join(f"{digest(folder / name)}  {name}\n" for name in FILES).encode()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None when all its bytes are those that were written."""
    try:
        expected, actual = (path / MANIFEST).read_bytes(), manifest(path)
    except PermissionError as error:
        # Not damage: going back to an older one would lose steps that are there.
        raise StorageError(f"{error.filename} cannot be read: {error.strerror}.") from error
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    if expected == actual:
        return None
    changed = [name for name, line in zip(FILES, actual.splitlines(), strict=True) if line not in expected]
    return f"{' and '.join(changed) or MANIFEST} does not have the digest that was written"


def load(folder: Path) -> Checkpoint:
    """Return the newest checkpoint whose every byte is as written. Raises `InputError` when there is none."""
    from safetensors.torch import load_file

    damaged: dict[str, str] = {}
    for step, path in reversed(find(folder)):
        if (reason := damage(path)) is not None:
            damaged[path.name] = reason
            continue
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        if record["step"] != step:
            damaged[path.name] = f"it is that of step {record['step']}, renamed"
            continue
        tensors = load_file(path / "tensors.safetensors")
        tensors |= {name: tensors[same] for name, same in record.pop("shared").items()}
        return Checkpoint(step, path, tensors, record, damaged)
    listed = "; ".join(f"{name}: {reason}" for name, reason in damaged.items())
    raise InputError(f"no checkpoint in {folder} is whole: {listed or 'none there'}.")


def cannot_write(folder: Path, what: str, error: Exception) -> str:
    """Say that `what` could not be written to `folder`, why, and what is left to go on from."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    # safetensors passes on the system's error as text.
    is_full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in reason
    free = f" ({shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free)" if is_full and folder.is_dir() else ""
    found = find(folder) if folder.is_dir() else []
    left = f"that of step {found[-1][0]} is whole, --resume continues from it" if found else "there is none before it"
    return f"{what} cannot be written to {folder}: {reason}{free}; {left}."
