"""The command `cpcompile`: train, explain and verify."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cpcompile.inspect.plots.command import add_plot

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
ExactDropout = Annotated[bool, typer.Option("--exact-dropout", help="Dropout draws what one device draws.")]
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
    html: Annotated[Path | None, typer.Option(help="Write the plan with pictures as one HTML file.")] = None,
) -> None:
    """Print the plan: attention sites, where inputs are sharded, every collective, memory. Needs no GPU and no process."""

    def run() -> None:
        import cpcompile
        from cpcompile.inspect.output_file import check_output

        if html is not None:
            check_output("--html", html, [".html"])
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
        if html is not None:
            html.write_text(plan.to_html(target))

    guard(run)


@app.command()
def verify(
    target: Target,
    world_size: WorldSize = 2,
    length: Length = 97,
    batch_size: BatchSize = 1,
    strategy: Strategy = "auto",
    balancer: Balancer = "auto",
    inner_size: InnerSize = 0,
    exact_dropout: ExactDropout = False,
) -> None:
    """Run all ranks in this process, node by node, against the untouched model; exit code 1 if they differ."""

    def run() -> None:
        import cpcompile

        model, inputs = load_target(target, length, batch_size)
        report = cpcompile.verify(
            model,
            inputs,
            world_size=world_size,
            inner_size=inner_size,
            strategy=strategy,
            balancer=balancer,
            exact_dropout=exact_dropout,
        )
        typer.echo(str(report))
        if not report.ok:
            raise typer.Exit(1)

    guard(run)


def load_target(target: str, length: int, batch_size: int) -> tuple[Any, Mapping[str, Any]]:
    """Return a model and its inputs. Raises `ConfigError` when `target` names neither a model folder nor a factory."""
    import torch

    from cpcompile.errors import ConfigError
    from cpcompile.train.model import find_model, load_model

    path = Path(target)
    if path.exists():
        model: Any = load_model(find_model(path), torch.float32, torch.device("cpu"))
        made: Any = model
    elif ":" in target:
        made = call_factory(target)
    else:
        raise ConfigError(f"{target}: neither a model folder nor module:factory.")
    if isinstance(made, tuple):
        model, inputs = made
        return model, inputs
    vocabulary = getattr(getattr(made, "config", None), "vocab_size", None)
    if vocabulary is None:
        raise ConfigError(f"{target}: the inputs of this model are unknown; let the factory return (model, inputs).")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch_size, length), generator=generator)
    return made, {"input_ids": tokens, "labels": tokens}


def call_factory(target: str) -> Any:
    """Return what `module:factory` returns; modules of the current folder are found."""
    import importlib

    from cpcompile.errors import ConfigError

    module_name, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{target}: {error}.") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"{target}: {module_name} has no function {name!r}.")
    return factory()


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


add_plot(app, guard)


def main() -> None:
    """Run the command line."""
    # The ranks would draw transformers' bars over each other. tqdm reads this when torch imports it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    app()
