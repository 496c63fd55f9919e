"""The command `cpcompile`: train, explain and verify."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cpcompile.commands.verify import verify as verify_command

# torch and transformers take seconds to import: each command imports what it needs, so that --help answers at
# once.

app = typer.Typer(name="cpcompile", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Graph(str, Enum):
    """Which graph `explain` prints."""

    before = "before"
    after = "after"


Strategy = Annotated[
    str, typer.Option(help="How attention is computed: auto, ulysses, ring, gather, halo, usp, latent or latent_heads.")
]
Kernel = Annotated[
    str, typer.Option(help="What computes a block of attention: auto, cudnn, flash, triton, flex, math, ...")
]
HeadsPerMessage = Annotated[int, typer.Option(min=0, help="Key heads that a rank receives at once; 0: all.")]
InnerSize = Annotated[
    int, typer.Option(min=0, help="How many of the ranks exchange heads in usp; 0: they are no grid.")
]
Balancer = Annotated[
    str, typer.Option(help="Which tokens each rank holds: auto, contiguous, zig_zag, balanced, zig_zag_by_document.")
]
Inner = Annotated[str, typer.Option(help="What compiles the graph: auto, inductor, aot_eager or eager.")]
Target = Annotated[
    str, typer.Argument(help="A transformers model folder, or module:factory that returns a model or (model, inputs).")
]
WorldSize = Annotated[int, typer.Option(min=1, help="Ranks that share the sequence.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of one sequence, over all ranks.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of one step.")]


@app.callback()
def root() -> None:
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
    ranks: Annotated[
        int | None, typer.Option(help="Processes that share each sequence [default: 2, or torchrun's]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps, those of a resumed checkpoint included.")] = 20,
    length: Length = 512,
    batch_size: BatchSize = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, constant.")] = 2e-5,
    max_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    strategy: Strategy = "auto",
    balancer: Balancer = "auto",
    kernel: Kernel = "auto",
    inner: Inner = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of parameters and optimizer: float32, bfloat16, float16 or float64.")
    ] = "float32",
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the trained model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in --save.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 10,
    log: Annotated[Path | None, typer.Option(help="Write one JSON line a step to this file.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    check: Annotated[bool, typer.Option(help="Compute the first step on one device too, and compare.")] = True,
    check_ranks: Annotated[bool, typer.Option(help="Compare the parameters of all ranks at each checkpoint.")] = True,
    apply: Annotated[bool, typer.Option(help="--no-apply trains the untouched model on one rank.")] = True,
    heartbeat: Annotated[float, typer.Option(help="Seconds that a rank may give no sign of life; 0: for ever.")] = 45.0,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error comes from.")] = False,
) -> None:
    """Fine-tune a causal language model on long documents, each sequence sharded over the ranks."""

    def run() -> None:
        from cpcompile.errors import ConfigError
        from cpcompile.train import TrainOptions
        from cpcompile.train import train as run_training

        num_ranks = ranks if ranks is not None else int(os.environ.get("WORLD_SIZE", 2 if apply else 1))
        if not apply and num_ranks != 1:
            raise ConfigError("--no-apply trains the untouched model, which is for --ranks 1.")
        options = TrainOptions(
            model=model,
            text=tuple(text or ()),
            ranks=num_ranks,
            steps=steps,
            length=length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            max_norm=max_norm,
            strategy=strategy,
            balancer=balancer,
            kernel=kernel,
            inner=inner,
            dtype=dtype,
            seed=seed,
            save=save,
            resume=resume,
            save_every=save_every,
            log=log,
            device=device,
            check=check,
            check_ranks=check_ranks,
            apply=apply,
            heartbeat=heartbeat,
        )
        run_training(options)

    guard(run, traceback=traceback)


@app.command()
def explain(
    target: Target,
    world_size: WorldSize = 2,
    length: Length = 512,
    batch_size: BatchSize = 1,
    strategy: Strategy = "auto",
    balancer: Balancer = "auto",
    inner_size: InnerSize = 0,
    kernel: Kernel = "auto",
    heads_per_message: HeadsPerMessage = 0,
    memory: Annotated[bool, typer.Option(help="Predict what a training step holds on a rank.")] = True,
    memory_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the blocks that keep intermediate results for backward.")
    ] = 1.0,
    offload: Annotated[
        str, typer.Option(help="What blocks that are computed again keep in host memory: none, inputs or all.")
    ] = "none",
    fully_sharded: Annotated[
        int, typer.Option(min=0, help="Ranks that fully_shard shards parameters over; 0: each rank has all.")
    ] = 0,
    ddp: Annotated[bool, typer.Option("--ddp", help="DistributedDataParallel holds copies of all gradients.")] = False,
    optimizer_states: Annotated[
        int, typer.Option(min=0, help="Tensors of the size of a parameter that the optimizer keeps (AdamW: 2).")
    ] = 2,
    device_memory: Annotated[
        float, typer.Option(min=0, help="GiB of a GPU, of which the longest sequence that fits is told; 0: not told.")
    ] = 0,
    graph: Annotated[Graph | None, typer.Option(help="Print this graph as code too.")] = None,
) -> None:
    """Print the plan: attention sites, where inputs are sharded, every collective, memory. Needs no GPU and no process."""

    def run() -> None:
        import cpcompile
        from cpcompile.commands.target import load_target

        model, inputs = load_target(target, length, batch_size)
        options: dict[str, Any] = {
            "world_size": world_size,
            "inner_size": inner_size,
            "strategy": strategy,
            "balancer": balancer,
            "kernel": kernel,
            "heads_per_message": heads_per_message,
            "memory_budget": memory_budget,
            "offload": offload,
            "optimizer_states": optimizer_states,
            "ddp": ddp,
            "fully_sharded": cpcompile.FullySharded(fully_sharded) if fully_sharded else None,
        }
        try:
            plan = cpcompile.explain(model, inputs, memory=memory, **options)
        except cpcompile.InternalError as error:  # of the prediction: the plan is told all the same
            plan = cpcompile.explain(model, inputs, **options)
            typer.echo(f"{plan}\n\n{error}")
        else:
            typer.echo(str(plan))
        if device_memory:
            from cpcompile.inspect.longest import longest_sequence

            found = longest_sequence(model, inputs, device_bytes=int(device_memory * 2**30), **options)
            text = f"{found.tokens} tokens" if found.tokens else "not even 1024 tokens a rank"
            typer.echo(f"\nlongest sequence of which a step fits {device_memory:g} GiB: {text}")
        if graph is not None:
            typer.echo(getattr(plan, graph.value))

    guard(run)


@app.command()
@functools.wraps(verify_command)
def verify(**given: Any) -> None:
    guard(lambda: verify_command(**given))


def guard(run: Callable[[], None], *, traceback: bool = False) -> None:
    """Run a command; an error for the user is its message and exit code 2, Ctrl-C is exit code 130, SIGTERM 143."""
    from cpcompile.errors import CPError

    console = Console(stderr=True)
    try:
        run()
    except CPError as error:
        if traceback:
            raise
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except SystemExit as end:
        # What training says of the signal that ended it.
        if str(end) != str(end.code):
            console.print(str(end), markup=False, highlight=False, soft_wrap=True)
        raise
    except KeyboardInterrupt:
        console.print("interrupted: all ranks were ended.")
        raise typer.Exit(130) from None


def main() -> None:
    """Run the command line."""
    # The ranks would draw transformers' bars over each other. tqdm reads this when torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    app()
