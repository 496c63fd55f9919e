"""`cpcompile diff`: the graph before and after, or before and after each pass, as a patch."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import cpcompile
from cpcompile.commands.guard import guard
from cpcompile.commands.options import NOT_OF_A_PLAN, takes_config
from cpcompile.commands.target import BatchSize, InnerSize, Length, Target, WorldSize, shape_of
from cpcompile.inspect.difference import CONTEXT, print_difference


@takes_config(*NOT_OF_A_PLAN)
def diff(
    target: Target,
    world_size: WorldSize = 2,
    length: Length = None,
    batch_size: BatchSize = None,
    inner_size: InnerSize = 0,
    passes: Annotated[bool, typer.Option("--passes", help="Print what each pass changes by itself.")] = False,
    only: Annotated[str, typer.Option("--pass", help="Print what this pass changes.")] = "",
    context: Annotated[int, typer.Option(min=0, help="Lines around a change.")] = CONTEXT,
    *,
    config: dict[str, Any],
) -> None:
    """Print what cpcompile changes in a model, as a patch of its graph with your lines."""

    def run() -> None:
        model, inputs = shape_of(target, length, batch_size)
        options = {"world_size": world_size, "inner_size": inner_size, **config}
        plan = cpcompile.explain(model, inputs, graphs=passes or bool(only), **options)
        if not (passes or only):
            print_difference(plan.before, plan.after, context)
            return
        ran = [run.name for run in plan.passes]
        if only and only not in ran:
            raise cpcompile.ConfigError(f"--pass {only}: no pass of that name ran; these did: {', '.join(ran)}.")
        before = plan.before
        for name, after in plan.graphs.items():
            if before != after and only in ("", name):
                typer.echo(typer.style(f"\n== {name}", bold=True))
                print_difference(before, after, context)
            before = after

    guard(run)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(diff)
