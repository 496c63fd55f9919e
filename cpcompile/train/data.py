"""Data: long documents, laid end to end with end-of-text tokens between them and cut into sequences of equal length."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpcompile.errors import ConfigError, InputError, StorageError

# Long modules that every Python has, as source files.
MODULES = ("argparse", "typing", "tarfile", "inspect", "subprocess", "pickle", "datetime", "doctest", "pdb", "turtle")


@dataclass(frozen=True, slots=True)
class Document:
    """One text and where it comes from."""

    name: str
    text: str


def check_paths(paths: Sequence[Path]) -> None:
    """Refuse a path that is not there, or has nothing in it."""
    for path in paths:
        try:
            if not path.exists():
                raise ConfigError(f"--text {path}: no such file or folder.")
            if not any(file.stat().st_size for file in list_files(path)):
                raise InputError(f"--text {path}: empty.")
        except OSError as error:
            raise StorageError(f"--text {error.filename or path}: {error.strerror}.") from error


def list_files(path: Path) -> list[Path]:
    """Return the file itself, or all files of a folder in the order of their paths; hidden ones are skipped."""
    if path.is_file():
        return [path]
    files = (file for file in path.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts))


def read_documents(paths: Sequence[Path]) -> tuple[list[Document], int]:
    """Return the texts of `paths` (or the default ones), and how many files of folders were skipped as not UTF-8 text."""
    if not paths:
        return default_documents(), 0
    documents, num_skipped = [], 0
    for path in paths:
        for file in list_files(path):
            try:
                text = file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                if path.is_file():
                    raise InputError(
                        f"--text {path}: not UTF-8 text ({error.reason} at byte {error.start})."
                    ) from error
                num_skipped += 1
                continue
            except OSError as error:
                raise InputError(f"--text {file}: {error.strerror}.") from error
            if text.strip():
                documents.append(Document(str(file), text))
    if not documents:
        raise InputError(f"--text {', '.join(map(str, paths))}: no text in it.")
    return documents, num_skipped


def default_documents() -> list[Document]:
    """Return Python's language reference as shipped for `help()`, and the sources of some long modules."""
    from pydoc_data.topics import topics

    documents = [Document(f"pydoc_data.topics[{name!r}]", text) for name, text in sorted(topics.items())]
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin) if spec is not None and spec.origin is not None else None
        if origin is not None and origin.suffix == ".py" and origin.is_file():
            documents.append(Document(name, origin.read_text(encoding="utf-8")))
    return documents


def tokenize(documents: Sequence[Document], tokenizer: Any) -> torch.Tensor:
    """Return all documents as one row of tokens, int64 `[tokens]`, the end-of-text token after each."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    rows = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)["input_ids"]
    ends = [] if separator is None else [separator]
    return torch.cat([torch.tensor([*row, *ends], dtype=torch.int64) for row in rows])


def pack(tokens: torch.Tensor, length: int) -> torch.Tensor:
    """Cut a row of tokens into sequences, `[sequences, length]`; the rest that fills no sequence is left out."""
    if len(tokens) < length:
        raise InputError(f"the text has {len(tokens)} tokens, fewer than one sequence of --length {length}.")
    return tokens[: len(tokens) // length * length].view(-1, length)


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """The batch of every step: a new order of all sequences each epoch, a function of the seed and the step alone."""

    sequences: torch.Tensor
    batch_size: int
    seed: int

    def at(self, step: int) -> torch.Tensor:
        """Return the batch of a step (counted from 0), int64 `[batch_size, length]`."""
        first = step * self.batch_size
        return torch.stack([self._sequence(index) for index in range(first, first + self.batch_size)])

    def _sequence(self, index: int) -> torch.Tensor:
        epoch, within = divmod(index, len(self.sequences))
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**64)
        order = torch.randperm(len(self.sequences), generator=generator)
        return self.sequences[int(order[within])]
