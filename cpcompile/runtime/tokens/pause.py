"""Pause: a debugger on the first rank that stops at a value of a running model, compiled or not, while the others wait.

hidden, rank 0, tokens 0:2 10:11 of 11 along dim 1: float64 [1, 3, 8], from -1.263 to 1.238, ...
(Pdb) value.norm()
"""

from __future__ import annotations

import bdb
import functools
import itertools
import pdb
import sys
import time
from collections import defaultdict
from typing import Any, TextIO

import torch
import torch.distributed as dist

from cpcompile._torch import group_store, resolve_group
from cpcompile.errors import DebuggerQuit

WAIT = 0.05  # seconds between two looks of a rank that waits
GO_ON, QUIT = "go on", "quit"
_NUMBERS: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)  # of the pauses of each group
_said: set[str] = set()


def pause(name: str, value: torch.Tensor, tokens: torch.Tensor | None, world_size: int, group: str) -> None:
    """Open a debugger on the first rank of a group, and have the others wait until it goes on.

    They wait at a store, which no time-out of collectives ends.

    Args:
        name: what the value is called.
        value: that this rank holds.
        tokens: the positions of its tokens; None for a value that every rank holds.
        world_size, group: the ranks. One rank alone is the first, and so is rank 0 of a job that is not context parallel.

    Raises:
        DebuggerQuit: the debugger was ended with `quit`, on all ranks.
    """
    if world_size == 1:
        rank = dist.get_rank() if dist.is_initialized() else 0
        if rank == 0:
            _raise_if_quit(_told_by_user(name, value, tokens, rank), name)
        return
    process_group = resolve_group(group)
    store, key = group_store(process_group), f"cpcompile pause {next(_NUMBERS[group])}"
    if dist.get_rank(process_group) == 0:
        answer = QUIT  # whatever ends this rank here ends the others
        try:
            answer = _told_by_user(name, value, tokens, dist.get_rank())
        finally:
            store.set(key, answer)
    else:
        while not store.check([key]):
            time.sleep(WAIT)
        answer = store.get(key).decode()
    _raise_if_quit(answer, name)


def _raise_if_quit(answer: str, name: str) -> None:
    if answer == QUIT:
        raise DebuggerQuit(f"the debugger that cpcompile.show had opened at {name!r} was ended with quit.")


def _told_by_user(name: str, value: torch.Tensor, tokens: torch.Tensor | None, rank: int) -> str:
    """Return what the user wants after having looked around."""
    files = terminal()
    if files is None:
        if name not in _said:
            _said.add(name)
            print(
                f"cpcompile: this process has no terminal, so that nothing stops at {name!r}.",
                file=sys.stderr,
                flush=True,
            )
        return GO_ON
    debugger = pdb.Pdb(stdin=files[0], stdout=files[1], nosigint=True, readrc=False)
    debugger.prompt = f"({name}) "
    try:
        _stop(debugger, value.detach(), tokens, rank)
    except bdb.BdbQuit:
        return QUIT
    return GO_ON


def _stop(debugger: Any, value: torch.Tensor, tokens: torch.Tensor | None, rank: int) -> None:
    """Here the user is: `value`, `tokens` and `rank` are what there is to look at; `c` goes on, and `q` ends all ranks."""
    debugger.set_trace()
    return  # the line that it stops at


def terminal() -> tuple[TextIO, TextIO] | None:
    """Return where a user types and reads: standard input, or the terminal behind a launcher that keeps it; None without one."""
    if sys.stdin is not None and sys.stdin.isatty():
        return sys.stdin, sys.stdout
    return _terminal_of_process()


@functools.cache
def _terminal_of_process() -> tuple[TextIO, TextIO] | None:
    try:
        return open("/dev/tty", encoding="utf-8"), open("/dev/tty", "w", encoding="utf-8")
    except OSError:
        return None
