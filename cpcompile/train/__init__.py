"""Train: fine-tune a causal language model on long documents, the sequence sharded over ranks.

In: `TrainOptions`. Out: a trained model and its checkpoints, from ranks that are started here or by torchrun. May import `front`
and below.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

from rich.console import Console

from cpcompile.errors import CPError
from cpcompile.train.failures import RankError
from cpcompile.train.interrupt import Interrupted
from cpcompile.train.join import is_launched, join
from cpcompile.train.launch import launch
from cpcompile.train.lock import locked
from cpcompile.train.options import TrainOptions, validated
from cpcompile.train.report import Reporter

__all__ = ["Interrupted", "RankError", "TrainOptions", "train"]


def train(options: TrainOptions, console: Console | None = None) -> None:
    """Train as `options` say, and show the run on `console`.

    Starts `options.ranks` local processes, or is one of them where torchrun has started this process.
    Raises a `CPError` for what the user can act on, and `Interrupted` after Ctrl-C or SIGTERM; by then no process that was
    started is left.
    """
    is_quiet = is_launched() and os.environ["RANK"] != "0"
    if is_quiet:
        options, console = replace(options, log=None, report_to="none"), Console(quiet=True)
    try:
        options, notes = validated(options)
    except CPError:
        # torchrun's other ranks find the same; one line is enough.
        if is_quiet:
            raise SystemExit(2) from None
        raise
    with contextlib.ExitStack() as stack:
        if options.save is not None and not is_quiet:
            stack.enter_context(locked(options.save, notes.append))
        report = stack.enter_context(Reporter(options, console or Console()))
        for note in notes:
            report.print(note)
        try:
            (join if is_launched() else launch)(options, report)
        except Interrupted as end:
            # torchrun's other ranks have nothing to add.
            if is_quiet:
                raise SystemExit(end.code) from None
            raise
