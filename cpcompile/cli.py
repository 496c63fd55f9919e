"""The command `cpcompile`: train, explain and verify."""

from __future__ import annotations

import importlib
import io
import os
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from cpcompile.commands.guard import guard

# torch and transformers take seconds to import: each command imports what it needs, so that --help answers at
# once. These are modules of `cpcompile.commands`, imported when they are asked for.
LAZY = {
    "explain": "Print the plan: attentions, where inputs are sharded, what is gathered, collectives, time, memory.",
    "explain-profile": "Print where the time of a step went, out of traces of torch.profiler.",
    "tune": "Measure the attention kernels and links of this machine once, for the cost model.",
    "verify": "Run all ranks against the untouched model; exit code 1 if something is WRONG, 2 if refused or failed.",
    "plot": "Draw masks, balance, benchmarks and traces.",
    "diff": "Print what cpcompile changes in a model, as a patch of its graph with your lines.",
}


def module_of(command: str) -> str:
    """Return the module of a command that is imported when it is asked for."""
    return f"cpcompile.commands.{command.replace('-', '_')}"


class Commands(typer.core.TyperGroup):
    """The commands that are defined here, and those that are imported when they are asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all."""
        return [*super().list_commands(ctx), *LAZY]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, or for a list of them its help alone."""
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        return typer.core.TyperCommand(cmd_name, help=LAZY[cmd_name])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Import the command that is run."""
        if args and args[0] in LAZY:
            command = typer.main.get_command(importlib.import_module(module_of(args[0])).app)
            return args[0], command, args[1:]
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            from difflib import get_close_matches

            meant = [name for name in names if args[0] in name] or get_close_matches(args[0], names, n=1)
            ctx.fail(f"No such command {args[0]!r}." + (f" Did you mean {meant[0]!r}?" if meant else ""))
        return super().resolve_command(ctx, args)


app = typer.Typer(name="cpcompile", cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


class Strategy(str, Enum):
    """How attention is computed; as in `cpcompile.Config`, which would import torch."""

    auto = "auto"
    halo = "halo"
    ulysses = "ulysses"
    usp = "usp"
    ring = "ring"
    gather = "gather"
    latent_heads = "latent_heads"
    latent = "latent"


class Kernel(str, Enum):
    """What computes a block of attention."""

    auto = "auto"
    cudnn = "cudnn"
    cudnn_varlen = "cudnn_varlen"
    flash3 = "flash3"
    flash4 = "flash4"
    triton = "triton"
    flash = "flash"
    flash_attn = "flash_attn"
    ring_flash_attn = "ring_flash_attn"
    efficient = "efficient"
    flex = "flex"
    cpu_flash = "cpu_flash"
    math = "math"


class Inner(str, Enum):
    """What compiles the graph: `auto` is Inductor where its own compiler is installed, else `aot_eager`."""

    auto = "auto"
    inductor = "inductor"
    aot_eager = "aot_eager"
    eager = "eager"


class Finite(str, Enum):
    """What is asked whether it is finite: nothing, each step, or each operator."""

    never = "never"
    step = "step"
    operators = "operators"


# Groups of ranks are named by their number, balanced:4, so that these are no enumeration.
BALANCERS = ("auto", "contiguous", "zig_zag", "zig_zag_by_document", "balanced")
Length = Annotated[int, typer.Option(min=2, help="Tokens of one sequence, over all ranks.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of one step.")]


def show_version(asked: bool) -> None:
    """Print the versions that a report of a bug needs, and end."""
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        import cpcompile

        typer.echo(f"cpcompile {cpcompile.__version__}")
        for package in ("torch", "transformers", "triton"):
            try:
                typer.echo(f"{package} {version(package)}")
            except PackageNotFoundError:
                typer.echo(f"{package} is not installed")
        typer.echo(f"python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """Make a single-device PyTorch model train on sequences sharded over several devices."""


@app.command()
def train(
    model: Annotated[
        Path | None, typer.Option(help="A transformers causal LM folder or a GGUF file [default: SmolLM2-135M]")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A text file or a folder of them; may repeat [default: Python's documentation]"),
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="A data set in the place of --text: a name on the Hugging Face hub, a folder or a file.")
    ] = "",
    dataset_config: Annotated[str, typer.Option(help="Its configuration, where it has several.")] = "",
    dataset_split: Annotated[str, typer.Option(help="Its split; train[:1000] is the first 1000 rows.")] = "train",
    dataset_column: Annotated[str, typer.Option(help="Its column of texts.")] = "text",
    ranks: Annotated[
        int | None, typer.Option(help="Processes that share each sequence [default: 2, or torchrun's]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps, those of a resumed checkpoint included.")] = 20,
    length: Length = 512,
    batch_size: BatchSize = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, constant.")] = 2e-5,
    max_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    strategy: Annotated[Strategy, typer.Option(help="How attention is computed.")] = Strategy.auto,
    balancer: Annotated[str, typer.Option(help="Which tokens each rank holds.", metavar="|".join(BALANCERS))] = "auto",
    kernel: Annotated[Kernel, typer.Option(help="What computes a block of attention.")] = Kernel.auto,
    inner: Annotated[Inner, typer.Option(help="What compiles the graph.")] = Inner.auto,
    dtype: Annotated[
        str, typer.Option(help="Of parameters and optimizer: float32, bfloat16, float16 or float64.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the trained model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --save.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    log: Annotated[Path | None, typer.Option(help="Write one JSON line a step to this file.")] = None,
    report_to: Annotated[
        str, typer.Option(help="Send the numbers of each step to tensorboard, wandb or trackio, too.")
    ] = "none",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    check: Annotated[bool, typer.Option(help="Compute the first step on one device too, and compare.")] = True,
    check_ranks: Annotated[bool, typer.Option(help="Compare the parameters of all ranks at each checkpoint.")] = True,
    check_finite: Annotated[
        Finite,
        typer.Option(
            help="End at the first value or gradient that is NaN or infinite, with its line: 'step' runs a step again that is "
            "not finite, 'operators' runs all uncompiled.",
        ),
    ] = Finite.never,
    apply: Annotated[bool, typer.Option(help="--no-apply trains the untouched model on one rank.")] = True,
    heartbeat: Annotated[float, typer.Option(help="Seconds that a rank may give no sign of life; 0: for ever.")] = 45.0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Fine-tune a causal language model on long documents, each sequence sharded over the ranks."""

    def run() -> None:
        if os.environ.get("RANK", "0") == "0":
            typer.echo("importing torch ...")
        from cpcompile.errors import ConfigError
        from cpcompile.train import TrainOptions
        from cpcompile.train import train as run_training

        num_ranks = ranks if ranks is not None else int(os.environ.get("WORLD_SIZE", 2 if apply else 1))
        if not apply and num_ranks != 1:
            raise ConfigError("--no-apply trains the untouched model, which is for --ranks 1.")
        options = TrainOptions(
            model=model,
            text=tuple(text or ()),
            dataset=dataset,
            dataset_config=dataset_config,
            dataset_split=dataset_split,
            dataset_column=dataset_column,
            ranks=num_ranks,
            steps=steps,
            length=length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_norm=max_norm,
            strategy=strategy.value,
            balancer=balancer,
            kernel=kernel.value,
            inner=inner.value,
            dtype=dtype,
            seed=seed,
            save=save,
            resume=resume,
            save_every=save_every,
            log=log,
            report_to=report_to,
            device=device,
            check=check,
            check_ranks=check_ranks,
            check_finite=check_finite.value,
            apply=apply,
            heartbeat=heartbeat,
        )
        run_training(options)

    guard(run, traceback=traceback)


def main() -> None:
    """Run the command line."""
    # The ranks would draw transformers' bars over each other. tqdm reads this when torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    for stream in (sys.stdout, sys.stderr):  # a picture has signs that not every encoding has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
