"""The command `verify`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpcompile.commands.guard import answering, guard, say
from cpcompile.commands.options import takes_config
from cpcompile.commands.target import BatchSize, InnerSize

if TYPE_CHECKING:
    from cpcompile.inspect.sweep import Case

# Fields of `Config` that are no options of this command, each with the reason.
LEFT_OUT = {
    "grad_sync": "others are for a wrapper around the model",
    "prefetch": "of parameters that fully_shard shards",
    "memory": "verify runs one plan",
    "optimizer_states": "for memory",
    "check_inputs": "the ranks are compared",
    "sync_weights": "each rank makes the same model",
    "inner_options": "a mapping of any values",
}
DEFAULT_LENGTH = 97  # of no use to any number of ranks, so that all have slots without a token


class Device(str, Enum):
    """What processes run on: `auto` is GPUs where there is one for each."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@takes_config(*LEFT_OUT)
def verify(
    target: Annotated[
        str,
        typer.Argument(
            help="A transformers model folder, or module:factory that returns a model or (model, inputs). A factory may take "
            "length and batch_size."
        ),
    ],
    world_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Ranks that share the sequence; may repeat [default: 2]")
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(min=2, help=f"Tokens of one sequence, over all ranks; may repeat [default: {DEFAULT_LENGTH}]"),
    ] = None,
    batch_size: BatchSize = None,
    seed: Annotated[int, typer.Option(help="Of the factory and of inputs that are drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="Run the model in it, in float64 for example; '': its own.")] = "",
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative error [default: what rounding explains]")
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Start a process for each rank (gloo, or NCCL on GPUs) and run them.")
    ] = False,
    device: Annotated[Device | None, typer.Option(help="What the processes of --real run on [default: auto]")] = None,
    minify: Annotated[
        Path | None, typer.Option(help="Write the smallest program that shows the first failure to this Python file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    inner_size: InnerSize = 0,
    *,
    config: dict[str, Any],
) -> None:
    """Run all ranks against the untouched model: exit code 0 if all is exact, 1 if something is WRONG, 2 if refused or failed.

    Without --real all ranks run in this process, node by node.
    """

    def run() -> None:
        from cpcompile.commands.target import load_target
        from cpcompile.errors import ConfigError, CPError
        from cpcompile.inspect.minify import minify as minimal
        from cpcompile.inspect.output_file import check_output, writing
        from cpcompile.inspect.sweep import Sweep, verify_sweep

        given: dict[str, Any] = {"inner_size": inner_size, "dtype": dtype_of(dtype), "tolerance": tolerance, **config}
        sizes = world_size or [2]
        cases: list[Case] = []
        first_wrong: tuple[Callable[[], tuple[Any, Any]], Case] | None = None
        if minify is not None:
            check_output("--minify", minify, [".py"])
        if device is not None and not real:
            raise ConfigError(
                f"--device {device.value}: this is for the processes of --real; without, all ranks run in this one."
            )
        with answering(as_json), progress(len(sizes) * len(length or [0])) as advance:
            lengths: Sequence[int | None] = length or [None]
            for tokens in lengths:
                make: Callable[[], tuple[Any, Any]] = functools.partial(
                    load_target, target, tokens, batch_size, seed, default_length=DEFAULT_LENGTH
                )
                if real:
                    from cpcompile.processes.verify_real import verify_real

                    found = []
                    for size in sizes:
                        on = (device or Device.auto).value
                        found.append(verify_real(make, world_size=size, device=on, **given))
                        advance(found[-1])
                else:
                    model, inputs = make()
                    found = [*verify_sweep(model, inputs, world_sizes=sizes, told=advance, **given).cases]
                wrong = next((case for case in found if not case.ok), None)
                first_wrong = first_wrong or (None if wrong is None else (make, wrong))
                cases += found
        report = Sweep(tuple(cases))
        typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
        if minify is not None and first_wrong is not None:
            make, wrong = first_wrong
            try:
                with answering(as_json), writing("--minify", minify):
                    model, inputs = make()
                    small = minimal(model, inputs, world_size=wrong.world_size, path=minify, **given)
                typer.echo(f"{minify}: {small}", err=as_json)
            except CPError as error:  # the exit code is that of the verdict
                say(f"--minify {minify}: {error}")
        elif minify is not None:
            typer.echo(f"{minify}: not written, for everything is exact", err=True)
        if report.exit_code:
            raise typer.Exit(report.exit_code)

    guard(run)


@contextmanager
def progress(total: int) -> Iterator[Callable[[Case], None]]:
    """Return what counts the cases that are done, on a bar on stderr if that is a terminal and there are several."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    is_shown = sys.stderr.isatty() and total > 1
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_shown) as bar:
        task = bar.add_task("verify", total=total)

        def advance(case: Case) -> None:
            bar.update(task, advance=1, description=f"{case.world_size} ranks, {case.tokens} tokens: {case.verdict}")

        yield advance


def dtype_of(name: str) -> Any:
    """Return the dtype of a name, None for ''.

    Raises:
        ConfigError: there is no floating-point dtype of this name.
    """
    if not name:
        return None
    import torch

    from cpcompile.errors import ConfigError

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"--dtype {name}: choose one of float64, float32, bfloat16 or float16.")
    return found


def full_name(option: str) -> str:
    """Return the option of an abbreviation."""
    return {"token-dim": "token-dims", "constant": "constants"}.get(option, option)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"token_normalize_func": full_name})(verify)
