"""`cpcompile plot`: pictures of masks, balance, benchmarks and traces."""

from __future__ import annotations

from enum import Enum
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import typer

from cpcompile.commands.guard import guard

# torch and matplotlib take long to import: each command imports what it needs, so that --help answers at once.

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Draw masks, balance, benchmarks and profiler traces."
)

Out = Annotated[Path, typer.Option(help="The picture that is written: a .png or .svg.")]
WorldSize = Annotated[int, typer.Option(min=1, help="Ranks that share the sequence.")]


class Mask(str, Enum):
    """What queries see."""

    causal = "causal"
    window = "window"
    packed = "packed"
    joint = "joint"


@app.command()
def mask(
    kind: Annotated[Mask, typer.Argument(help="What queries see.")] = Mask.causal,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens (default: of documents or parts, or 64).")] = None,
    world_size: WorldSize = 4,
    layout: Annotated[
        list[str] | None,
        typer.Option(help="Which tokens each rank holds; may repeat (default: contiguous, zig_zag, balanced)"),
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="Keys that a query sees, its own included.")] = 0,
    documents: Annotated[str, typer.Option(help="Tokens of each document: 30,20,14.")] = "",
    parts: Annotated[str, typer.Option(help="Tokens of each sequence that is joined: 16,48.")] = "",
    out: Annotated[
        Path | None, typer.Option(help="The picture that is written: a .png or .svg (default: the terminal)")
    ] = None,
) -> None:
    """Draw which rank computes which part of an attention, and the work of each."""

    def run() -> None:
        from rich.console import Console

        from cpcompile.inspect.masks import matrices
        from cpcompile.inspect.plots.mask import plot_masks
        from cpcompile.inspect.visualize import Picture

        of_documents, of_parts = numbers(documents, "--documents"), numbers(parts, "--parts")
        tokens = length if length is not None else sum(of_documents) or sum(of_parts) or 64
        found = matrices(
            kind.value,
            length=tokens,
            world_size=world_size,
            layouts=layout or ["contiguous", "zig_zag", "balanced"],
            window=window,
            documents=of_documents,
            parts=of_parts,
        )
        if out is None:
            for matrix in found:
                Console().print(Picture(matrix, world_size))
        else:
            plot_masks(found, f"{kind.value}, {tokens} tokens on {world_size} ranks", out)
            typer.echo(f"written to {out}")

    guard(run)


@app.command()
def balance(
    out: Out,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens (default: those of the documents, or 65536 of a mix).")
    ] = None,
    world_size: WorldSize = 8,
    documents: Annotated[
        str, typer.Option(help="A mix: one, giant, log_normal, tiny; or the tokens of each document: 3000,1000.")
    ] = "log_normal",
) -> None:
    """Draw the work of each rank by balancer, of causal attention within documents."""

    def run() -> None:
        from cpcompile.inspect.plots.balance import plot_balance, work_by_balancer

        bounds = bounds_of(documents, length)
        tokens = bounds[-1]
        title = f"{len(bounds) - 1} document(s), {tokens} tokens on {world_size} ranks"
        plot_balance(work_by_balancer(tokens, world_size, bounds), title, out)
        typer.echo(f"written to {out}")

    guard(run)


@app.command()
def scaling(result: Annotated[Path, typer.Argument(help="A JSON of benchmarks/scaling.py.")], out: Out) -> None:
    """Draw percent of the limit and of weak scaling over GPUs, out of a benchmark."""

    def run() -> None:
        from cpcompile.inspect.plots.scaling import plot_scaling, read_result

        plot_scaling(read_result(result), out)
        typer.echo(f"written to {out}")

    guard(run)


@app.command()
def timeline(
    traces: Annotated[list[Path], typer.Argument(help="Traces of torch.profiler, one for each rank: .json, .json.gz.")],
    out: Annotated[
        Path,
        typer.Option(help="The picture that is written: a .png or .svg, or a .html that can be zoomed and searched."),
    ],
) -> None:
    """Draw attention kernels, transfers and the host of each rank along the time."""

    def run() -> None:
        from cpcompile.inspect.output_file import check_output, writing
        from cpcompile.inspect.plots.canvas import SUFFIXES
        from cpcompile.inspect.plots.trace import plot_trace
        from cpcompile.inspect.report.timeline import timeline_page
        from cpcompile.inspect.timeline import read_tracks
        from cpcompile.inspect.trace import read_lanes

        check_output("--out", out, (*SUFFIXES, ".html"))
        title = ", ".join(path.name for path in traces)
        if out.suffix == ".html":
            page = timeline_page(read_tracks(traces), title)
            with writing("--out", out):
                out.write_text(page, encoding="utf-8")
        else:
            plot_trace(read_lanes(traces), title, out)
        typer.echo(f"written to {out}")

    guard(run)


def bounds_of(documents: str, length: int | None) -> list[int]:
    """Return 0 and the end of each document, of a mix of `length` tokens or of documents whose tokens are given.

    Raises:
        ConfigError: these are not `length` tokens together, or nothing that is known.
    """
    import torch

    from cpcompile.balance import MIXES
    from cpcompile.errors import ConfigError

    if documents in MIXES:
        return MIXES[documents](length or 65536, torch.Generator().manual_seed(0)).tolist()
    of_documents = numbers(documents, "--documents", f", or a mix: {', '.join(MIXES)}")
    total = sum(of_documents)
    if not total or total != (length or total):
        raise ConfigError(
            f"--documents {documents!r} are {total} tokens" + (f", and --length is {length}." if total else ".")
        )
    return [0, *accumulate(of_documents)]


def numbers(text: str, option: str, more: str = "") -> list[int]:
    """Return numbers that commas separate.

    Raises:
        ConfigError: something is no positive number.
    """
    from cpcompile.errors import ConfigError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"{option} {text}: expected numbers of tokens, as in 30,20,14{more}.")
    return [int(part) for part in parts]
