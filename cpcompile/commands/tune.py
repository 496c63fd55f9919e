"""`cpcompile tune`: measure the attention kernels, products, memory and links of this machine, for the cost model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cpcompile.choose.machine import Machine, tuned_file
from cpcompile.commands.guard import guard
from cpcompile.errors import ConfigError


def tune(
    out: Annotated[
        Path | None, typer.Option(help="File for the measurements [default: where cpcompile reads them]")
    ] = None,
    length: Annotated[int, typer.Option(min=1024, help="Tokens of the attention that kernels are timed on.")] = 32768,
    network: Annotated[
        float,
        typer.Option(min=0, help="GB/s of a GPU to other hosts, which one host cannot measure; 0: as on an H100 host."),
    ] = 0,
) -> None:
    """Measure attention kernels, products, memory and links of this machine once; `auto` and `explain` then compute with them.

    Copy the file to all hosts of a job, or name it by CPCOMPILE_MACHINE: ranks that choose differently are refused.
    """

    def run() -> None:
        import torch

        from cpcompile.inspect.measure import measured_machine

        if not torch.cuda.is_available():
            raise ConfigError("tune measures GPUs, and torch sees none here. explain --device h100 needs none.")
        found = measured_machine(length, network * 1e9, report=lambda text: typer.echo(text, err=True))
        file = out or tuned_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(found.to_json())
        typer.echo("\n".join(lines_of(found)))
        typer.echo(f"written to {file}")

    guard(run)


def lines_of(machine: Machine) -> list[str]:
    """Return what was measured, for people."""
    kernels = [f"  {name}: {a / 1e12:.0f} TFLOP/s forward, {b / 1e12:.0f} backward" for name, (a, b) in machine.kernels]
    rest = f"  {machine.products / 1e12:.0f} TFLOP/s of products, {machine.bandwidth / 1e12:.2f} TB/s of memory, read and written"
    links = f"  {machine.symmetric / 1e9:.0f} GB/s between GPUs from shared memory, {machine.p2p / 1e9:.0f} by NCCL"
    return [f"{machine.name}, {machine.ranks_of_host} of a host", *kernels, rest, links, f"  links: {machine.source}"]


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(tune)
