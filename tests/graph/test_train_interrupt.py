"""Signals: the first asks for the end after a step, and only a second Ctrl-C is in a hurry."""

import os
import signal
import threading

import pytest

from cpcompile.errors import StorageError
from cpcompile.train.interrupt import Interrupt, Interrupted, catching
from cpcompile.train.join import end_after_step


def test_sigterm_may_come_twice() -> None:
    interrupt = Interrupt()
    with catching(interrupt):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert (interrupt.number, interrupt.is_urgent) == (signal.SIGTERM, False)


def test_ctrl_c_twice_is_urgent() -> None:
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGINT)
    with catching(interrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert (interrupt.number, interrupt.is_urgent) == (signal.SIGINT, False)
        os.kill(os.getpid(), signal.SIGINT)
    assert (interrupt.number, interrupt.is_urgent) == (signal.SIGINT, True)
    assert signal.getsignal(signal.SIGINT) is before


def test_with_nothing_to_save_there_is_nothing_to_wait_for() -> None:
    with pytest.raises(Interrupted) as raised, catching(Interrupt(is_patient=False)):
        os.kill(os.getpid(), signal.SIGTERM)
    assert (raised.value.code, str(raised.value)) == (143, "SIGTERM: ended before there was a step to save.")


def test_other_threads_leave_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found: list[object] = []

    def run() -> None:
        with catching(Interrupt()):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_a_log_that_fails_asks_for_the_end() -> None:
    interrupt, error = Interrupt(), StorageError("--log x cannot be written: No space left on device.")
    end_after_step(interrupt, error)
    end_after_step(interrupt, StorageError("again"))
    assert (interrupt.number, interrupt.error) == (signal.SIGTERM, error)
    with pytest.raises(StorageError, match="No space"):
        end_after_step(Interrupt(is_patient=False), error)
