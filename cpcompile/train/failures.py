"""Failures: how a rank ended, in words, and which of several failures made the others."""

from __future__ import annotations

import re
import signal
import time
import traceback

from cpcompile.errors import CPError
from cpcompile.train.events import Failed
from cpcompile.train.interrupt import Interrupted
from cpcompile.train.model import first_line

_TIMEOUT = re.compile(r"timed? ?out|killed by SIGABRT", re.IGNORECASE)  # NCCL's watchdog ends a process by SIGABRT
_CONNECTION = re.compile(r"connection|peer|gloo|NCCL|socket|timed out", re.IGNORECASE)


class RankError(CPError):
    """A rank ended early."""


def failed(rank: int, error: BaseException) -> Failed:
    """Describe an error of a rank."""
    trace, now = "".join(traceback.format_exception(error)), time.monotonic()
    if isinstance(error, Interrupted):
        return Failed(rank, error.text, trace, True, now, error.number)
    is_user_error = isinstance(error, CPError)
    return Failed(rank, str(error) if is_user_error else f"failed with {first_line(error)}", trace, is_user_error, now)


def died(rank: int, code: int | None) -> Failed:
    """Describe the death of a rank that did not say anything."""
    return Failed(rank, exit_reason(code), "", False, time.monotonic())


def exit_reason(code: int | None) -> str:
    """Say in words how a process ended."""
    if code is None or code >= 0:
        return f"ended with exit code {code} before its last step"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def is_lost_connection(text: str) -> bool:
    """Whether an error is what the end of another rank looks like from here."""
    return bool(_CONNECTION.search(text))


def is_timeout(text: str) -> bool:
    """Whether an error, or a death, is what a rank that does not come looks like after a while."""
    return bool(_TIMEOUT.search(text))


def root_cause(failures: list[Failed]) -> Failed:
    """Return the failure that made the others: a death, else an error that is no lost connection, else the first."""

    def order(failure: Failed) -> tuple[bool, bool, float]:
        is_death = failure.text.startswith("was killed")
        return not is_death, not failure.is_user_error and is_lost_connection(failure.text), failure.time

    return min(failures, key=order)


def as_error(failure: Failed, advice: str = "") -> RankError | Interrupted:
    """Return the error for a failure: a user's error speaks for itself, others name their rank and get `advice`."""
    if failure.signal:
        return Interrupted(failure.signal, failure.text)
    if failure.is_user_error:
        return RankError(failure.text)
    error = RankError(f"rank {failure.rank} {failure.text}; all ranks were ended.{advice}")
    if failure.traceback:
        error.__cause__ = RuntimeError(failure.traceback)
    return error
