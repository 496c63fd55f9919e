"""Guard: errors for the user are messages and exit codes, and what a command prints for programs is nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator

import typer
from rich.console import Console


def guard(run: Callable[[], None], *, traceback: bool = False) -> None:
    """Run a command; an error for the user is its message and exit code 2, Ctrl-C is 130, a closed pipe 141, SIGTERM 143."""
    from cpcompile.errors import CPError

    try:
        with short_warnings():
            run()
    except CPError as error:
        if traceback:
            raise
        say("\n".join([f"error: {error}", *error.__notes__]))
        raise typer.Exit(2) from error
    except BrokenPipeError:  # `| head` has read enough; 1 would say that something is WRONG
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still to be flushed
        raise typer.Exit(141) from None
    except SystemExit as end:
        # What training says of the signal that ended it.
        if str(end) != str(end.code):
            say(str(end))
        raise
    except KeyboardInterrupt:
        say("interrupted: all ranks were ended.")
        raise typer.Exit(130) from None


def say(text: str) -> None:
    """Print to stderr what is not the answer of a command, as it is: `my_model:key:` is no picture of a key."""
    Console(stderr=True).print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def short_warnings() -> Iterator[None]:
    """Print warnings of ours without the line of our own that warns: their text has the user's."""
    formatted = warnings.formatwarning

    def short(message: Warning | str, category: type[Warning], filename: str, *more: object) -> str:
        is_ours = "/cpcompile/" in filename.replace("\\", "/")
        return f"warning: {message}\n" if is_ours else formatted(message, category, filename, *more)  # type: ignore[arg-type]

    warnings.formatwarning = short  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = formatted


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[None]:
    """Leave stdout to the answer where a program reads it: what a model or its factory prints goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
