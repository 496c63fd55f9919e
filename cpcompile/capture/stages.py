"""Stages: what a first call does for so long is said on the first rank, in lines on stderr.

What takes a moment is not mentioned, what takes long is mentioned again, and what was compiled is told in one line.
`logging.getLogger("cpcompile.stages").setLevel("WARNING")` silences all of it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from cpcompile import _torch

PATIENCE = 5.0  # seconds without a word
REPEAT = 20.0  # seconds until a stage that goes on is mentioned again
YOUNG_OBJECTS = 1_000_000  # how many are made before Python looks for garbage; by default it is 700


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_log = logging.getLogger("cpcompile.stages")
_log.setLevel(logging.INFO)
_log.addHandler(_ToStderr())
_log.propagate = False


@contextlib.contextmanager
def stage(name: str) -> Iterator[None]:
    """Surround a stage; if it takes longer than `PATIENCE` seconds, say so while it runs, now and then, and how long it took."""
    start, is_over = time.perf_counter(), threading.Event()
    threading.Thread(target=_say_while, args=(name, start, is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
        seconds = time.perf_counter() - start
    if seconds > PATIENCE:
        say(f"{name} took {seconds:.0f} s")


@contextlib.contextmanager
def rare_garbage_collection() -> Iterator[None]:
    """Have Python look for garbage seldom: a compilation makes millions of objects, almost none of which are garbage yet."""
    young, *old = gc.get_threshold()
    if young:  # 0: it is switched off
        gc.set_threshold(max(young, YOUNG_OBJECTS), *old)
    try:
        yield
    finally:
        gc.set_threshold(young, *old)


class Tracing:
    """The stage in which Dynamo traces a model: from when it begins, if it does, until it hands over a graph."""

    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Surround a call of a compiled function."""
        with contextlib.ExitStack() as compilation:

            def begin() -> None:
                compilation.enter_context(rare_garbage_collection())
                self._open.enter_context(stage("tracing the model"))

            with _torch.when_tracing(begin):
                try:
                    yield
                finally:
                    self.end()

    def end(self) -> None:
        """End the stage: what follows is not Dynamo's."""
        self._open.close()


def _say_while(name: str, start: float, is_over: threading.Event) -> None:
    """Say what goes on, until it is over."""
    if is_over.wait(PATIENCE):
        return
    say(f"{name} ...")
    while not is_over.wait(REPEAT):
        say(f"{name} goes on: {time.perf_counter() - start:.0f} s so far")


def say(text: str) -> None:
    """Print a line on stderr, on the first rank."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        _log.info("cpcompile: %s", text)
