"""`cpcompile explain`: the plan of a model, without GPUs and without its weights."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import cpcompile
from cpcompile.choose.machine import MACHINES, machine_named, this_machine
from cpcompile.commands.guard import answering, guard
from cpcompile.commands.options import NOT_OF_A_PLAN, takes_config
from cpcompile.commands.target import BatchSize, InnerSize, Length, Target, WorldSize, shape_of
from cpcompile.inspect.output_file import check_output, writing
from cpcompile.inspect.text import size

if TYPE_CHECKING:
    from cpcompile.inspect.explanation import Explanation


class Graph(str, Enum):
    """Which graph `explain` prints."""

    before = "before"
    after = "after"
    backward = "backward"


@takes_config(*NOT_OF_A_PLAN)
def explain(
    target: Target,
    world_size: WorldSize = 2,
    length: Length = None,
    batch_size: BatchSize = None,
    inner_size: InnerSize = 0,
    device: Annotated[
        str,
        typer.Option(
            help=f"GPUs that the plan is for, here or not: {', '.join(MACHINES)}, or a file that `cpcompile tune` wrote. "
            "By default this machine."
        ),
    ] = "",
    gpus: Annotated[int, typer.Option(min=0, help="Ranks that share the sequence, in the place of --world-size.")] = 0,
    hosts: Annotated[int, typer.Option(min=1, help="Hosts that these GPUs are on.")] = 1,
    memory: Annotated[bool, typer.Option(help="Predict what a training step holds on a rank.")] = True,
    one_device: Annotated[
        bool, typer.Option("--one-device", help="Predict what the untouched model holds on one device, too.")
    ] = False,
    fully_sharded: Annotated[
        int, typer.Option(min=0, help="Ranks that fully_shard shards parameters over; 0: each rank has all.")
    ] = 0,
    ddp: Annotated[bool, typer.Option("--ddp", help="DistributedDataParallel holds copies of all gradients.")] = False,
    optimizer_states: Annotated[
        int, typer.Option(min=0, help="Tensors of the size of a parameter that the optimizer keeps (AdamW: 2).")
    ] = 2,
    device_memory: Annotated[
        float,
        typer.Option(
            min=0, help="GiB of a GPU, of which the longest sequence that fits is told [default: those of --device]"
        ),
    ] = 0,
    graph: Annotated[Graph | None, typer.Option(help="Print this graph as code too.")] = None,
    value: Annotated[
        str, typer.Option(help="Draw which rank holds which tokens of this value of the graph, too.")
    ] = "",
    program: Annotated[
        Path | None, typer.Option(help="Write the program of every rank as Python that torchrun starts, too.")
    ] = None,
    longest: Annotated[
        bool, typer.Option("--longest", help="The longest sequence that fits a GPU of --device.")
    ] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what changes in the code of the graph too.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the plan with pictures as one HTML file, too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, and nothing else.")] = False,
    *,
    config: dict[str, Any],
) -> None:
    """Print the plan: attentions, where inputs are sharded, what is gathered, collectives, time, memory.

    Needs no GPU, no process, and of a model folder no weights.
    """

    def run() -> None:
        if html is not None:
            check_output("--html", html, [".html"])
        if program is not None:
            check_output("--program", program, [".py"])
        ranks = gpus or world_size
        machine = machine_named(device or "h100", hosts=hosts, gpus=ranks) if device or hosts > 1 else None
        with answering(as_json):
            model, inputs = shape_of(target, length, batch_size, of_gpus=machine is not None)
        options: dict[str, Any] = {
            "world_size": ranks,
            "inner_size": inner_size,
            "optimizer_states": optimizer_states,
            "ddp": ddp,
            "fully_sharded": cpcompile.FullySharded(fully_sharded) if fully_sharded else None,
            **({"device": machine} if machine else {}),
            **config,
        }
        backward = graph is Graph.backward
        with answering(as_json):
            wanted: dict[str, Any] = {
                "memory": memory,
                "graphs": html is not None,
                "backward": backward,
                "program": program is not None,
            }
            plan = cpcompile.explain(model, inputs, **wanted, **options)
        if html is not None:
            with writing("--html", html):
                html.write_text(plan.to_html(target), encoding="utf-8")
        if program is not None:
            with writing("--program", program):
                program.write_text(plan.program, encoding="utf-8")
        if as_json:
            typer.echo(json.dumps(plan.to_dict(), indent=1))
            return
        typer.echo(str(plan))
        if one_device:
            typer.echo("\n" + beside_one_device(plan, cpcompile.explain(model, inputs, memory=True, **options | ONE)))
        room = device_memory * 2**30 or (machine or this_machine()).memory * longest
        if room:
            from cpcompile.inspect.longest_sequence import MOST, longest_sequence

            found = longest_sequence(model, inputs, device_bytes=int(room), **options)
            at_least = "at least " if found.tokens >= MOST else ""
            text = f"{at_least}{found.tokens} tokens" if found.tokens else "not even 1024 tokens a rank"
            typer.echo(f"\nlongest sequence of which a step fits {size(room)}: {text}")
        if value:
            typer.echo("\n" + plan.value(value))
        if graph is not None:
            typer.echo("\n" + (getattr(plan, graph.value) or "nothing takes a gradient: there is no backward"))
        if diff:
            from cpcompile.inspect.difference import print_difference

            print_difference(plan.before, plan.after)

    guard(run)


ONE: dict[str, Any] = {"world_size": 1, "inner_size": 0, "fully_sharded": None}


def beside_one_device(plan: Explanation, one: Explanation) -> str:
    """Return the memory of a rank beside that of one device."""
    assert one.memory is not None
    text = f"on one device a step holds {size(one.memory.peak)} at the peak"
    return text if plan.memory is None else f"{text}: {one.memory.peak / plan.memory.peak:.3g} times what a rank holds"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(explain)
