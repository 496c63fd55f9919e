"""Interrupt: a signal asks a run to end; it ends after a step that all ranks agree on, once that is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cpcompile.errors import CPError


class Interrupted(SystemExit):
    """The run ended because the signal `number` asked for it: `text` says how far it came, the exit code is 128 + `number`."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(128 + number)
        self.number = number
        self.text = text

    def __str__(self) -> str:
        return f"{name_of(self.number)}: {self.text}"


@dataclass(slots=True)
class Interrupt:
    """What has asked this process to end, if anything has.

    Attributes:
        number: the signal, or 0.
        is_urgent: Ctrl-C came when the end was already asked for.
        is_patient: False ends the process in the signal's handler, for there is nothing to save.
        error: what is the real reason, where this process has asked itself.
    """

    number: int = 0
    is_urgent: bool = False
    is_patient: bool = True
    error: CPError | None = None

    def __call__(self, number: int, frame: Any = None) -> None:
        if not self.is_patient:
            raise Interrupted(number, "ended before there was a step to save.")
        # Only Ctrl-C is pressed twice by people in a hurry; `timeout` and schedulers send SIGTERM twice.
        self.is_urgent = bool(self.number) and number == signal.SIGINT
        self.number = self.number or number


@contextlib.contextmanager
def catching(act: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    """Let signals call `act`: Ctrl-C and SIGTERM, which schedulers send, or others. Signals belong to the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, act) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def name_of(number: int) -> str:
    """Return what people call a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
