"""The command `verify`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpcompile.commands.guard import guard

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
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of one batch.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the factory and of inputs that are drawn.")] = 0,
    dtype: Annotated[str, typer.Option(help="Run the model in it, in float64 for example; '': its own.")] = "",
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest relative error [default: what rounding explains]")
    ] = None,
    real: Annotated[
        bool, typer.Option("--real", help="Start a process for each rank (gloo, or NCCL on GPUs) and run them.")
    ] = False,
    device: Annotated[str, typer.Option(help="Of --real: auto, cpu or cuda.")] = "auto",
    minify: Annotated[
        Path | None, typer.Option(help="Write the smallest program that shows the first failure to this Python file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    strategy: Annotated[
        str,
        typer.Option(help="How attention is computed: auto, ulysses, ring, gather, halo, usp, latent, latent_heads."),
    ] = "auto",
    balancer: Annotated[
        str, typer.Option(help="Which tokens a rank holds: auto, contiguous, zig_zag, balanced, zig_zag_by_document.")
    ] = "auto",
    inner_size: Annotated[
        int, typer.Option(min=0, help="How many of the ranks exchange heads in usp; 0: they are no grid.")
    ] = 0,
    heads_per_message: Annotated[int, typer.Option(min=0, help="Key heads that a rank receives at once; 0: all.")] = 0,
    token_dims: Annotated[
        list[str] | None, typer.Option("--token-dim", help="An input with tokens, and their dim: x=1; may repeat.")
    ] = None,
    token_local: Annotated[
        list[str] | None, typer.Option(help="A module that computes each token alone, by path or class; may repeat.")
    ] = None,
    constants: Annotated[
        list[str] | None, typer.Option("--constant", help="An input whose values decide sizes; may repeat.")
    ] = None,
    documents: Annotated[str, typer.Option(help="What tells packed documents apart: eos:2, positions, ...")] = "",
    mask_labels: Annotated[
        bool, typer.Option("--mask-labels", help="Losses ignore labels of another document; with --documents.")
    ] = False,
    exact_dropout: Annotated[
        bool, typer.Option("--exact-dropout", help="Dropout draws what one device draws.")
    ] = False,
    strict: Annotated[bool, typer.Option(help="--no-strict gathers hidden states where there is no rule.")] = True,
    dynamic: Annotated[bool, typer.Option(help="--no-dynamic compiles each length by itself.")] = True,
    outputs: Annotated[str, typer.Option(help="Sequence-shaped outputs come back local or full.")] = "local",
    logits: Annotated[str, typer.Option(help="Logits beside a loss are made when they are read, or keep.")] = "auto",
    loss_chunk: Annotated[int, typer.Option(min=0, help="Tokens of which logits are in memory at once.")] = 4096,
    loss_provider: Annotated[
        str, typer.Option(help="What computes the loss: auto, own, torch, liger or cut_cross_entropy.")
    ] = "auto",
    tile: Annotated[int, typer.Option(min=0, help="Tokens that MLPs run for at once; 0: all.")] = 0,
    memory_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the blocks that keep intermediate results for backward.")
    ] = 1.0,
    offload: Annotated[
        str, typer.Option(help="What recomputed blocks keep in host memory: none, inputs or all.")
    ] = "none",
    kernel: Annotated[str, typer.Option(help="Of --real: what computes a block of attention.")] = "auto",
    transport: Annotated[str, typer.Option(help="Of --real: how keys travel: auto, symmetric or p2p.")] = "auto",
    inner: Annotated[str, typer.Option(help="Of --real: inductor, aot_eager or eager.")] = "inductor",
    mode: Annotated[str, typer.Option(help="Of --real: the mode of Inductor.")] = "",
    recompute_attention: Annotated[
        bool, typer.Option("--recompute-attention", help="Of --real: activation checkpoints run attention again.")
    ] = False,
    recompute_elementwise: Annotated[bool, typer.Option(help="Of --real: norms and activations are run again.")] = True,
    outline_layers: Annotated[bool, typer.Option(help="Of --real: equal layers are compiled once.")] = True,
) -> None:
    """Run all ranks against the untouched model: exit code 0 if all is exact, 1 if something is WRONG, 2 if refused or failed.

    Without --real all ranks run in this process, node by node.
    """
    from cpcompile.commands.target import load_target
    from cpcompile.inspect.minify import minify as minimal
    from cpcompile.inspect.sweep import Sweep, verify_sweep

    options: dict[str, Any] = {
        "strategy": strategy,
        "balancer": balancer,
        "heads_per_message": heads_per_message,
        "token_dims": dict(map(token_dim, token_dims or ())),
        "token_local": tuple(token_local or ()),
        "constants": tuple(constants or ()),
        "documents": documents,
        "mask_labels": mask_labels,
        "exact_dropout": exact_dropout,
        "strict": strict,
        "dynamic": dynamic,
        "outputs": outputs,
        "logits": logits,
        "loss_chunk": loss_chunk,
        "loss_provider": loss_provider,
        "tile": tile,
        "memory_budget": memory_budget,
        "offload": offload,
        "kernel": kernel,
        "transport": transport,
        "inner": inner,
        "mode": mode,
        "recompute_attention": recompute_attention,
        "recompute_elementwise": recompute_elementwise,
        "outline_layers": outline_layers,
    }
    run = {"inner_size": inner_size, "dtype": dtype_of(dtype), "tolerance": tolerance}
    sizes = world_size or [2]
    cases: list[Case] = []
    first_wrong: tuple[Callable[[], tuple[Any, Any]], Case] | None = None
    with progress(len(sizes) * len(length or [0])) as advance:
        for tokens in length or [DEFAULT_LENGTH]:
            make: Callable[[], tuple[Any, Any]] = functools.partial(
                load_target, target, tokens, batch_size, seed, bool(length)
            )
            if real:
                from cpcompile.real import verify_real

                found = []
                for size in sizes:
                    found.append(verify_real(make, world_size=size, device=device, **run, **options))
                    advance(found[-1])
            else:
                model, inputs = make()
                found = [*verify_sweep(model, inputs, world_sizes=sizes, told=advance, **run, **options).cases]
            wrong = next((case for case in found if not case.ok), None)
            first_wrong = first_wrong or (None if wrong is None else (make, wrong))
            cases += found
    report = Sweep(tuple(cases))
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if minify is not None and first_wrong is not None:
        make, wrong = first_wrong
        model, inputs = make()
        small = minimal(model, inputs, world_size=wrong.world_size, path=minify, **run, **options)
        typer.echo(f"{minify}: {small}", err=as_json)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


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


def token_dim(text: str) -> tuple[str, int]:
    """Return the name and the dim of `x=1`.

    Raises:
        ConfigError: it is not of this form.
    """
    from cpcompile.errors import ConfigError

    name, _, dim = text.partition("=")
    if not name or not dim.removeprefix("-").isdigit():
        raise ConfigError(f"--token-dim {text}: write the name of an input and the dim of its tokens, x=1.")
    return name, int(dim)


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


@functools.wraps(verify)
def guarded(**given: Any) -> None:
    """Run the command, and tell its errors."""
    guard(lambda: verify(**given))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command("verify")(guarded)
