"""Texts become the same sequences everywhere, and what is no text is refused in one line."""

from pathlib import Path

import pytest
import torch

from cpcompile.errors import ConfigError, InputError, StorageError
from cpcompile.train import data


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eos_token_id = 256

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}


def batches(seed: int = 0) -> data.Batches:
    return data.Batches(torch.arange(20).view(5, 4), batch_size=2, seed=seed)


def test_documents_end_with_the_separator() -> None:
    documents = [data.Document("a", "ab"), data.Document("b", "c")]
    assert data.tokenize(documents, Bytes()).tolist() == [97, 98, 256, 99, 256]


def test_packing_leaves_only_the_rest_out() -> None:
    assert data.pack(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_too_little_text() -> None:
    with pytest.raises(InputError, match=r"the text has 3 tokens, fewer than one sequence of --length 4"):
        data.pack(torch.arange(3), 4)


def test_batches_depend_on_seed_and_step_alone() -> None:
    later = [batches().at(step) for step in (3, 1)]
    again = [batches().at(step) for step in (3, 1)]
    assert all(torch.equal(a, b) for a, b in zip(later, again, strict=True))
    assert any(not torch.equal(batches(0).at(step), batches(1).at(step)) for step in range(3))


def test_every_sequence_once_an_epoch() -> None:
    rows = torch.cat([batches().at(step) for step in range(5)])[:, 0].tolist()
    assert sorted(rows[:5]) == sorted(rows[5:]) == [0, 4, 8, 12, 16]


def test_default_documents_are_long() -> None:
    documents = data.default_documents()
    assert len(documents) > 50
    assert sum(len(document.text) for document in documents) > 500_000


def test_folders_are_read_in_order_and_binary_files_skipped(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"second",
        "a/z.md": b"first",
        "c.bin": b"\xff\xfe\x00",
        ".git/x": b"hidden",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents, num_skipped = data.read_documents([tmp_path])
    assert [document.text for document in documents] == ["first", "second"]
    assert num_skipped == 1


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--text .*nowhere\.txt: no such file or folder"):
        data.check_paths([tmp_path / "nowhere.txt"])


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=r"empty\.txt: empty"):
        data.check_paths([tmp_path / "empty.txt"])


def test_blank_text(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(InputError, match=r"blank\.txt: no text in it"):
        data.read_documents([tmp_path / "blank.txt"])


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match=r"not UTF-8 text \(invalid start byte at byte 0\)"):
        data.read_documents([tmp_path / "image.png"])


@pytest.mark.parametrize("seed", [20261128215000, 2**64 - 1, -(2**63)])
def test_seeds_of_64_bits(seed: int) -> None:
    batches = data.Batches(torch.arange(200).view(100, 2), batch_size=3, seed=seed)
    assert torch.equal(batches.at(40), batches.at(40))
    others = data.Batches(batches.sequences, batch_size=3, seed=seed - 1 if seed > 0 else seed + 1)
    assert not torch.equal(batches.at(40), others.at(40))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, **options: bool) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(StorageError, match=r"--text .*secret\.txt: Permission denied"):
        data.check_paths([tmp_path / "secret.txt"])


@pytest.mark.parametrize("suffix", sorted({*data.FORMATS} - {".arrow", ".csv"}))
def test_files_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"text": ["first", "second", "third"]})
    file = tmp_path / f"rows{suffix}"
    if suffix == ".txt":
        file.write_text("first\nsecond\nthird\n")
    else:
        getattr(rows, f"to_{'json' if suffix == '.jsonl' else suffix[1:]}")(file)
    found = data.DatasetSource(str(file), split="train[:2]").documents()
    assert [document.text for document in found] == ["first", "second"]
    assert found[1].name == f"{file}[1]"


@pytest.mark.parametrize("split", ["", "test"])
def test_data_sets_that_were_saved(tmp_path: Path, split: str) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["first", "", None, "second"]})
    (datasets.DatasetDict({split: rows}) if split else rows).save_to_disk(tmp_path)
    source = data.DatasetSource(str(tmp_path), split=split, column="body")
    assert [document.text for document in source.documents()] == ["first", "second"]
    with pytest.raises(InputError, match=r"(?m)has no column text: choose one of body by --dataset-column\.$"):
        data.DatasetSource(str(tmp_path), split=split).documents()
    if split:
        with pytest.raises(InputError, match=r"(?m)^--dataset .* does not load: KeyError: 'train'$"):
            data.DatasetSource(str(tmp_path)).documents()
