"""`cpcompile explain-profile`: where the time of a step went, out of traces of torch's profiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cpcompile.commands.guard import guard

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def explain_profile(
    traces: Annotated[list[Path], typer.Argument(help="Traces of torch.profiler, one for each rank: .json, .json.gz.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Traces to compare with, of the same job with other options; once for each rank."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
) -> None:
    """Print what of a step was attention, by layer and strategy, transfers (overlapped or exposed), other kernels, gaps."""

    def run() -> None:
        from cpcompile.inspect.profile import read_profile, to_dict
        from cpcompile.inspect.profile_difference import difference_text
        from cpcompile.inspect.profile_text import to_text

        found, before = read_profile(traces), read_profile(against or [])
        if as_json:
            typer.echo(json.dumps(to_dict(found, before), indent=1))
            return
        typer.echo(to_text(found))
        if before:
            typer.echo(f"\n{difference_text(found, before)}")

    guard(run)
