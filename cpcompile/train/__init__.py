"""Train: fine-tune a causal language model on long documents, the sequence sharded over ranks."""

from __future__ import annotations

import os
from dataclasses import replace

from rich.console import Console

from cpcompile.errors import CPError
from cpcompile.train.launch import RankError, is_launched, join, launch
from cpcompile.train.options import TrainOptions, validated
from cpcompile.train.report import Reporter

__all__ = ["RankError", "TrainOptions", "train"]


def train(options: TrainOptions, console: Console | None = None) -> None:
    """Train as `options` say, and show the run on `console`.

    Starts `options.ranks` local processes, or is one of them where torchrun has started this process.
    Raises a `CPError` for what the user can act on; by then no process that was started is left.
    """
    is_quiet = is_launched() and os.environ["RANK"] != "0"
    try:
        options, notes = validated(options)
    except CPError:
        # torchrun's other ranks find the same; one line is enough.
        if is_quiet:
            raise SystemExit(2) from None
        raise
    console = console or Console()
    if is_quiet:
        options, console = replace(options, log=None), Console(quiet=True)
    with Reporter(options, console) as report:
        for note in notes:
            report.print(note)
        (join if is_launched() else launch)(options, report)
