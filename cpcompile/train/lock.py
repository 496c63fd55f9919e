"""Lock: one run a folder. The kernel holds the lock, so that it goes with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cpcompile.errors import StorageError

NAME = "lock"
_UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def locked(folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder` for this run. Raises `StorageError` when another run has it, or when nothing can be written there."""
    try:
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(f"--save {folder} cannot be written to: {error.strerror}.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace").strip()
            raise StorageError(
                f"--save {folder} is in use by another run ({holder}): wait for its end, or save to another folder."
            ) from None
        except OSError as error:
            if error.errno not in _UNKNOWN:
                raise StorageError(f"--save {folder} cannot be locked: {error.strerror}.") from error
            note(f"{folder} knows no locks ({error.strerror}): see that no other run saves there.")
        # Who it is, for the message of the next one; what a dead run has left is written over.
        with contextlib.suppress(OSError):
            os.truncate(handle, 0)
            text = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            os.write(handle, text.encode())
        yield
    finally:
        os.close(handle)
