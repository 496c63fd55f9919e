"""Guard: errors for the user are messages and exit codes."""

from __future__ import annotations

from collections.abc import Callable

import typer
from rich.console import Console


def guard(run: Callable[[], None], *, traceback: bool = False) -> None:
    """Run a command; an error for the user is its message and exit code 2, Ctrl-C is exit code 130, SIGTERM 143."""
    from cpcompile.errors import CPError

    console = Console(stderr=True)
    try:
        run()
    except CPError as error:
        if traceback:
            raise
        text = "\n".join([f"error: {error}", *error.__notes__])
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except SystemExit as end:
        # What training says of the signal that ended it.
        if str(end) != str(end.code):
            console.print(str(end), markup=False, highlight=False, soft_wrap=True)
        raise
    except KeyboardInterrupt:
        console.print("interrupted: all ranks were ended.")
        raise typer.Exit(130) from None
