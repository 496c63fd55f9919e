"""`python -m cpcompile.zoo`: run the zoo and write the tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cpcompile.zoo.catalogue import Entry, find_entries
from cpcompile.zoo.programs.making import CATALOGUES, find_programs
from cpcompile.zoo.progress import Limits, run_and_keep
from cpcompile.zoo.result import Variant, read
from cpcompile.zoo.run import Job

MODELS = "transformers"
ATTENTION = ("sdpa", "eager", "flex_attention")
app = typer.Typer(name="cpcompile.zoo", add_completion=False, pretty_exceptions_enable=False)


@app.command()
def zoo(
    models: Annotated[
        list[str] | None,
        typer.Option("--models", "-m", help="An entry (causal:llama, llama) or a category; may repeat."),
    ] = None,
    catalogue: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join((MODELS, *CATALOGUES))}: what to run; may repeat [default: {MODELS}]"),
    ] = None,
    attention: Annotated[
        list[str] | None, typer.Option(help="sdpa, eager or flex_attention; may repeat [default: all]")
    ] = None,
    world_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Ranks; may repeat [default: 2 and 4, of programs 2, 3 and 4]")
    ] = None,
    packed: Annotated[
        bool | None, typer.Option("--packed/--dense", help="Only packed documents, or only whole rows [default: both]")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option(help="Only strict, or only with hidden states gathered [default: both]")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Models at once, each in its own process.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    timeout: Annotated[float, typer.Option(help="Seconds for one variant of one model.")] = 300.0,
    memory: Annotated[float, typer.Option(help="GiB for one process.")] = 8.0,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Where results go: this name with .jsonl (every run), .json and .md (tables) [default: zoo, zoo_beyond, random]"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the results that are there, run the rest.")] = False,
    random: Annotated[
        int, typer.Option(min=0, help="Run this many configurations that are drawn at random instead.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="What --random draws from.")] = 0,
    first: Annotated[int, typer.Option(min=0, help="The index of the first configuration of --random.")] = 0,
    only: Annotated[
        str, typer.Option(help="Only those of --random whose description has this regular expression: 'mpt.*left'.")
    ] = "",
) -> None:
    """Run transformers architectures as tiny random models through `cpcompile.verify`.

    With --catalogue, programs beyond them: transformers of diffusers and timm, of the sciences, and as people write them.
    With --random, sizes, heads, inputs and options are drawn too; one of the same seed and index is always the same.

    Exit code 1: something is wrong or crashes. Ctrl-C keeps what is done; continue with --resume.
    """
    # Tiny tensors: more threads only wait for each other. Before anything imports torch, so that workers have it too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    console = Console()
    catalogues = catalogue or [MODELS]
    output = output or Path("random" if random else "zoo" if catalogues == [MODELS] else "zoo_beyond")
    results_path = output.with_suffix(".jsonl")
    limits = Limits(num_workers=jobs, timeout=timeout, memory=memory)
    if random:
        if models or catalogue or attention or world_size or packed is not None or strict is not None:
            raise typer.BadParameter("draws these itself: choose with --only.", param_hint="--random")
        from cpcompile.zoo.drawn.command import run_random

        raise typer.Exit(
            run_random(range(first, first + random), seed, only, results_path, console, limits, device, resume)
        )
    for name in catalogues:
        if name not in (MODELS, *CATALOGUES):
            raise typer.BadParameter(f"{name} is none of {', '.join((MODELS, *CATALOGUES))}.", param_hint="--catalogue")
    keys = [key for text in models or [""] for key in find_programs(catalogues, text)]
    try:
        others = [text for text in models or [] if not find_programs(catalogues, text)]
        entries = find_entries(others) if MODELS in catalogues and (others or not models) else []
        if others and MODELS not in catalogues:
            raise KeyError(f"{others[0]}: no such program in {', '.join(catalogues)}.")
    except KeyError as error:
        raise typer.BadParameter(error.args[0], param_hint="--models") from None
    for name in attention or []:
        if name not in ATTENTION:
            raise typer.BadParameter(f"{name} is none of {', '.join(ATTENTION)}.", param_hint="--attention")
    if not resume:
        results_path.unlink(missing_ok=True)
    plan = [
        Job(entry.key, variants_of(name, is_packed, world_size or [2, 4], strict), device)
        for entry in entries
        for name in attention or ATTENTION
        for is_packed in ((False, True) if packed is None else (packed,))
        if not is_packed or takes_packed(entry)
    ]
    plan += [Job(key, variants_of("", False, world_size or [2, 3, 4], strict), device) for key in dict.fromkeys(keys)]
    done = {result.id for result in read(results_path)}
    missing = [rest for job in plan if (rest := without(job, done)).variants]
    if not run_and_keep(missing, results_path, console, limits):
        raise typer.Exit(130)
    finish(results_path, console, device)


def variants_of(attention: str, packed: bool, world_sizes: list[int], strict: bool | None) -> tuple[Variant, ...]:
    """Return the variants of one job."""
    modes = (True, False) if strict is None else (strict,)
    return tuple(Variant(attention, packed, size, mode) for mode in modes for size in world_sizes)


def takes_packed(entry: Entry) -> bool:
    """Tell whether packed documents make sense: a language model that reads one text."""
    return entry.category == "causal"


def without(job: Job, done: set[tuple[str, Variant]]) -> Job:
    """Return the part of a job that has no result yet."""
    rest = tuple(variant for variant in job.variants if (job.key, variant) not in done)
    return Job(job.key, rest, job.device)


def finish(results_path: Path, console: Console, device: str = "cpu") -> None:
    """Write the page and the compact results, show the counts, and end with exit code 1 if something must not be."""
    from cpcompile.zoo.report import compact, markdown, show
    from cpcompile.zoo.summary import failures

    results = read(results_path)
    page_path = results_path.with_suffix(".md")
    page_path.write_text(markdown(results, device))
    results_path.with_suffix(".json").write_text(compact(results, device))
    show(console, results)
    console.print(f"{len(results)} results in {results_path}, tables in {page_path}")
    if failures(results):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
