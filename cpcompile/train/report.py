"""Report: show events on a terminal, or as plain lines, and write the log."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cpcompile.errors import StorageError
from cpcompile.train.events import Comparison, Event, Note, Phase, Resumed, Saved, Step
from cpcompile.train.loop import relative
from cpcompile.train.options import TrainOptions
from cpcompile.train.tracking import Tracker, open_tracker, tracking_errors

GIB = 2**30
PATIENCE = 5.0  # seconds without a line, until the first step is done


class Reporter:
    """Shows the events of a run, one after the other; the comparison with one device comes last.

    What is no terminal has no clock that goes on, so a phase that takes long says so now and then.
    """

    def __init__(self, options: TrainOptions, console: Console) -> None:
        self.options = options
        self.console = console
        self.comparison: Comparison | None = None
        self.tracker: Tracker | None = None
        self.phase, self.begun, self.spoken = "", 0.0, 0.0
        self.is_over = threading.Event()
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=options.steps)

    def __enter__(self) -> Reporter:
        if self.options.log is not None and not self.options.resume:
            with log_errors(self.options.log):
                self.options.log.write_text("")
        if not self.options.resume:
            self.tracker = open_tracker(self.options)
        self.progress.start()
        if not (self.console.is_terminal or self.console.quiet):
            threading.Thread(target=self.tell_time, name="time", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.is_over.set()
        self.progress.stop()
        if self.tracker is not None:
            # What ended the run is to be told, not what a tracker says of it.
            with (
                contextlib.suppress(*([] if error is None else [StorageError])),
                tracking_errors(self.options.report_to),
            ):
                self.tracker.finish(exit_code=0 if error is None else 1)
        if self.comparison is not None and error is None:
            self.console.print(comparison_table(self.comparison))

    def __call__(self, event: Event) -> None:
        match event:
            case Phase(text):
                self.progress.update(self.task, description=text)
                self.phase, self.begun = text, time.monotonic()
                if not self.console.is_terminal:
                    self.print(f"{text} ...")
            case Note(text):
                self.print(text)
            case Saved(path):
                self.print(f"saved {path}")
            case Resumed(step):
                self.progress.update(self.task, completed=step)
                self.print(f"resumed after step {step}")
                if self.options.log is not None:
                    for note in keep_log(self.options.log, step):
                        self.print(note)
                self.progress.stop()  # a tracker may ask for a key
                self.tracker = open_tracker(self.options, step)
                self.progress.start()
            case Step():
                self.progress.update(self.task, completed=event.step, description="training")
                self.phase = ""
                self.print(step_line(event, self.options.steps))
                if self.options.log is not None:
                    append_log(self.options.log, event)
                if self.tracker is not None:
                    with tracking_errors(self.options.report_to):
                        self.tracker.log(numbers(event), event.step)
            case Comparison():
                self.comparison = event
            case _:
                raise AssertionError(f"no way to show {event!r}")

    def tell_time(self) -> None:
        """Say how long a phase has taken, whenever nothing was said for a while."""
        while not self.is_over.wait(PATIENCE / 5):
            now = time.monotonic()
            if self.phase and now - self.spoken >= PATIENCE:
                self.print(f"{self.phase}: {now - self.begun:.0f} s so far")

    def print(self, text: str) -> None:
        """Print a line as it is, above the progress bar."""
        self.spoken = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def step_line(step: Step, steps: int) -> str:
    """Return the numbers of a step as one line."""
    width = len(str(steps))
    return (
        f"step {step.step:>{width}}/{steps}  loss {step.loss:.4f}  grad norm {step.grad_norm:.4f}  "
        f"{step.tokens_per_second:,.0f} tokens/s  {step.memory / GIB:.2f} GiB  {step.seconds:.1f} s"
    )


def append_log(path: Path, step: Step) -> None:
    """Add a step to the log."""
    with log_errors(path), path.open("a") as file:
        file.write(json.dumps({"step": step.step, **numbers(step)}) + "\n")


def numbers(step: Step) -> dict[str, float]:
    """Return what is written of a step, by name."""
    return {
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "tokens_per_second": step.tokens_per_second,
        "seconds": step.seconds,
        "memory_bytes": step.memory,
    }


def keep_log(path: Path, step: int) -> list[str]:
    """Drop the steps after `step`: they are taken again. Return what to say of lines that are no steps; they are dropped too."""
    notes: list[str] = []
    if not path.is_file():  # not there yet, or a device
        return notes
    with log_errors(path):
        lines = path.read_bytes().splitlines()
        kept = []
        for number, line in enumerate(lines, 1):
            found = step_of(line)
            if found is None:
                notes.append(f"{path.name}: line {number} is no whole record, left out: {line[:60]!r}")
            elif found <= step:
                kept.append(line + b"\n")
        # Beside the old one and renamed: a crash here loses no line.
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(b"".join(kept))
        partial.replace(path)
    return notes


def step_of(line: bytes) -> int | None:
    """Return the step of a line of the log, or None when it was written by half, or damaged."""
    try:
        found = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


@contextlib.contextmanager
def log_errors(path: Path) -> Iterator[None]:
    """Say of the system's errors that they are those of the log."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"--log {path} cannot be written: {error.strerror}.") from error


def comparison_table(comparison: Comparison) -> Table:
    """Return the first step on one device beside that on the ranks."""
    single, ranks = comparison.single, comparison.ranks
    plural = "s" if comparison.num_ranks > 1 else ""
    table = Table(title=f"First step ({comparison.dtype})", box=box.SIMPLE, title_justify="left")
    for title in ("", "one device", f"{comparison.num_ranks} rank{plural}", "relative difference"):
        table.add_column(title, justify="left" if not title else "right", no_wrap=True)
    table.add_row("loss", f"{single.loss:.7f}", f"{ranks.loss:.7f}", f"{relative(single.loss, ranks.loss):.1e}")
    norm = relative(single.grad_norm, ranks.grad_norm)
    table.add_row("gradient norm", f"{single.grad_norm:.7f}", f"{ranks.grad_norm:.7f}", f"{norm:.1e}")
    name = furthest(comparison)
    one, many = single.grad_norms[name], ranks.grad_norms[name]
    table.add_row("of the furthest parameter", f"{one:.7f}", f"{many:.7f}", f"{relative(one, many):.1e}")
    table.caption = f"furthest of {len(single.grad_norms)} parameters: {name}"
    if not comparison.exact:
        table.caption += "\nthe model has dropout: the two differ by chance"
    return table


def furthest(comparison: Comparison) -> str:
    """Return the parameter whose gradient norm differs most, leaving out those that are zero up to rounding."""
    single, ranks = comparison.single.grad_norms, comparison.ranks.grad_norms
    floor = 1e-6 * comparison.single.grad_norm
    return max(single, key=lambda name: abs(single[name] - ranks[name]) / max(single[name], floor))
