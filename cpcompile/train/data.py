"""Data: long documents, laid end to end with end-of-text tokens between them and cut into sequences of equal length."""

from __future__ import annotations

import importlib
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


# What `datasets` reads a file as, by its suffix.
FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


@dataclass(frozen=True, slots=True)
class DatasetSource:
    """A data set: its name on the Hugging Face hub, a folder or a file; each row of `column` is a document."""

    name: str
    config: str = ""
    split: str = "train"
    column: str = "text"

    @property
    def is_local(self) -> bool:
        """Whether it lies on this host."""
        return Path(self.name).exists()

    def load(self) -> Any:
        """Return the split as `datasets` reads it."""
        datasets = importlib.import_module("datasets")
        datasets.disable_progress_bars()
        path = Path(self.name)
        if path.suffix in FORMATS and path.is_file():
            return datasets.load_dataset(FORMATS[path.suffix], data_files=self.name, split=self.split)
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of `save_to_disk`
            found = datasets.load_from_disk(self.name)
            return found[self.split] if isinstance(found, dict) else found
        return datasets.load_dataset(self.name, self.config or None, split=self.split)

    def documents(self) -> list[Document]:
        """Return the rows as documents. Raises `InputError`."""
        try:
            rows = self.load()
        except Exception as error:
            # A folder, a format and the network fail in many ways.
            raise InputError(f"--dataset {self.name} does not load: {type(error).__name__}: {error}") from error
        if self.column not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise InputError(
                f"--dataset {self.name} has no column {self.column}: choose one of {names} by --dataset-column."
            )
        texts = rows[self.column]
        documents = [
            Document(f"{self.name}[{index}]", text)
            for index, text in enumerate(texts)
            if isinstance(text, str) and text
        ]
        if not documents:
            raise InputError(f"--dataset {self.name}: no text in column {self.column}.")
        return documents


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


def read_documents(paths: Sequence[Path], source: DatasetSource | None = None) -> tuple[list[Document], int]:
    """Return the texts of `source` or `paths` (or the default ones), and how many files of folders were skipped as no UTF-8."""
    if source is not None:
        return source.documents(), 0
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
