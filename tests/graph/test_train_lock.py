"""One run a folder: the second is refused by name, and the lock goes with its process."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cpcompile.errors import StorageError
from cpcompile.train import train
from cpcompile.train.lock import locked
from tests.train_support import tiny_options

# Locks as a run does, without importing torch.
HOLDER = """
import fcntl, os, sys, time
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(handle, fcntl.LOCK_EX)
os.write(handle, b"process 7 on another")
print("locked", flush=True)
time.sleep(100)
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    options = tiny_options(tmp_path, save=tmp_path, ranks=1)
    command = [sys.executable, "-S", "-c", HOLDER, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(
            StorageError,
            match=r"--save .* is in use by another run \(process 7 on another\): wait for its end, or save to another",
        ):
            train(options, Console(quiet=True))
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    # What the dead one has left is no lock.
    notes: list[str] = []
    with locked(tmp_path, notes.append):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not notes


def test_one_process_cannot_lock_twice(tmp_path: Path) -> None:
    with locked(tmp_path, print), pytest.raises(StorageError, match="in use"), locked(tmp_path, print):
        pass
    with locked(tmp_path, print):
        pass


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes: list[str] = []
    with locked(tmp_path, notes.append):
        pass
    assert notes == [f"{tmp_path} knows no locks (Operation not supported): see that no other run saves there."]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, mode: int) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(StorageError, match=r"--save .* cannot be written to: Read-only file system"),
        locked(tmp_path, print),
    ):
        pass
