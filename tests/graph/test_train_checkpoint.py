"""A crash while writing loses nothing, damage of any kind is found before a byte is used, and full disks are named."""

import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from cpcompile.errors import InputError, StorageError
from cpcompile.train import checkpoint

ROOT = Path(__file__).parents[2]


def write(folder: Path, *steps: int) -> None:
    for step in steps:
        weight = torch.full((300,), float(step))
        checkpoint.save(
            folder, step, {"weight": weight, "tied": weight, "count": torch.tensor(step)}, {"job": {"x": 1}}
        )


def test_the_newest_is_read(tmp_path: Path) -> None:
    write(tmp_path, 9, 10)
    found = checkpoint.load(tmp_path)
    assert (found.step, found.path.name, found.damaged) == (10, "checkpoint-000010", {})
    assert found.record == {"job": {"x": 1}, "step": 10}
    assert found.tensors["weight"].tolist() == found.tensors["tied"].tolist() == [10.0] * 300
    assert found.tensors["count"].item() == 10


def test_one_storage_is_written_once(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    checkpoint.save(
        tmp_path, 1, {"a": whole, "b": whole, "part": whole[2:4], "turned": whole.view(2, 4).t(), "none": whole[:0]}, {}
    )
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-000001" / "tensors.safetensors")
    assert sorted(stored) == ["a", "none", "part", "turned"]
    found = checkpoint.load(tmp_path).tensors
    assert found["b"].tolist() == whole.tolist()
    assert found["part"].tolist() == [2.0, 3.0]
    assert found["turned"].tolist() == whole.view(2, 4).t().tolist()


def test_the_manifest_is_what_sha256sum_checks(tmp_path: Path) -> None:
    write(tmp_path, 1)
    tool = shutil.which("sha256sum") or pytest.skip("no sha256sum here")
    subprocess.run([tool, "--check", "--strict", "manifest"], cwd=tmp_path / "checkpoint-000001", check=True)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    assert [step for step, _ in checkpoint.find(tmp_path)] == [2, 3]


def test_a_damaged_one_is_passed_over_and_then_left_behind(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    (tmp_path / "checkpoint-000020" / "record.json").write_text("{}")
    found = checkpoint.load(tmp_path)
    assert found.step == 10
    assert found.damaged == {"checkpoint-000020": "record.json does not have the digest that was written"}
    write(tmp_path, 15)  # one whole checkpoint would be left if the damaged one counted
    assert [step for step, _ in checkpoint.find(tmp_path)] == [10, 15]
    write(tmp_path, 20)
    assert checkpoint.load(tmp_path).step == 20


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 10, 20)
    (tmp_path / "checkpoint-000020" / "manifest").unlink()
    write(tmp_path, 20)
    assert (checkpoint.load(tmp_path).step, checkpoint.load(tmp_path).damaged) == (20, {})


def test_a_renamed_one_is_not_what_it_says(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "checkpoint-000001").rename(tmp_path / "checkpoint-000007")
    with pytest.raises(InputError, match=r"checkpoint-000007: it is that of step 1, renamed"):
        checkpoint.load(tmp_path)


def test_nothing_that_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-000001").mkdir()
    with pytest.raises(InputError, match=r"no checkpoint in .* is whole: checkpoint-000001: manifest: No such file"):
        checkpoint.load(tmp_path)


def damage(folder: Path, kind: str, draw: random.Random) -> str:
    """Damage one file of a checkpoint and return what was done."""
    file = folder / draw.choice(("manifest", *checkpoint.FILES))
    data = bytearray(file.read_bytes())
    start = draw.randrange(len(data))
    match kind:
        case "flipped":
            data[start] ^= 1 << draw.randrange(8)
        case "zeroed":
            end = min(len(data), start + draw.choice((1, 64, 512)))
            data[start:end] = bytes(end - start)
        case "truncated":
            del data[start:]
        case "extended":
            data += bytes(draw.randrange(1, 64))
    file.write_bytes(bytes(data))
    return f"{file.name}: {kind} at {start} of {len(data)}"


def check_damage(tmp_path: Path, kind: str, count: int) -> None:
    """Damage the newer of two checkpoints `count` times: the older one is read, unless the bytes are the same."""
    whole = tmp_path / "whole"
    write(whole, 1, 2)
    num_changed = 0
    for seed in range(count):
        folder = tmp_path / "run"
        shutil.copytree(whole, folder)
        newest = folder / "checkpoint-000002"
        done = damage(newest, kind, random.Random(f"{kind} {seed}"))
        names = ("manifest", *checkpoint.FILES)
        is_same = all((newest / name).read_bytes() == (whole / newest.name / name).read_bytes() for name in names)
        found = checkpoint.load(folder)
        assert found.step == (2 if is_same else 1), done
        assert (list(found.damaged) == []) == is_same, done
        num_changed += not is_same
        shutil.rmtree(folder)
    print(f"\n{kind}: {num_changed} of {count} changed a byte, none of them was read")
    assert num_changed > count / 3  # a zeroed block of zeros is none


KINDS = ("flipped", "zeroed", "truncated", "extended")


@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_read(tmp_path: Path, kind: str) -> None:
    check_damage(tmp_path, kind, 40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_of_thousands_is_read(tmp_path: Path, kind: str) -> None:
    check_damage(tmp_path, kind, 3000)


def test_a_full_disk_is_named_and_the_last_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        StorageError,
        match=r"(?m)^the checkpoint of step 2 cannot be written to .*: No space left on device \([\d,]+ MiB are free\); "
        r"that of step 1 is whole, --resume continues from it\.$",
    ):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


def test_a_system_error_inside_safetensors_is_one_line(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(
            StorageError, match=r"^the checkpoint of step 1 cannot be written to .*File too large.*none"
        ):
            checkpoint.save(tmp_path, 1, {"weight": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


# Forks writers and kills them: a process of its own, for torch's threads do not survive a fork.
KILLER = """
import os, random, shutil, signal, sys, time, torch
from pathlib import Path
from cpcompile.train import checkpoint

torch.set_num_threads(1)
folder, draw, num_partial = Path(sys.argv[1]), random.Random(0), 0
for _ in range(int(sys.argv[2])):
    shutil.rmtree(folder)
    folder.mkdir()
    read, write = os.pipe()
    writer = os.fork()
    if writer == 0:
        for step in range(1, 100_000):
            checkpoint.save(folder, step, {"weight": torch.full((30_000,), float(step))}, {})
            os.write(write, f"{step}\\n".encode())
    os.close(write)
    first = os.read(read, 2)
    time.sleep(draw.uniform(0.0, 0.1))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    reported = int((first + os.read(read, 1 << 20)).split()[-1])
    os.close(read)
    num_partial += bool(list(folder.glob("*.partial")))
    found = checkpoint.load(folder)
    assert found.damaged == {} and found.step in (reported, reported + 1), (found.damaged, found.step, reported)
    assert found.tensors["weight"].unique().tolist() == [float(found.step)]
    checkpoint.save(folder, found.step + 1, {}, {})
    assert not list(folder.glob("*.partial"))
print(num_partial)
"""


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_loses_nothing_it_reported(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path), str(count)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > count / 5  # many were killed while writing


def test_what_may_not_be_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1, 2)

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "digest", refuse)
    with pytest.raises(StorageError, match=r"checkpoint-000002/record\.json cannot be read: Permission denied"):
        checkpoint.load(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(StorageError, match="cannot be read: Permission denied"):
        checkpoint.find(tmp_path)
