"""Progress: jobs run behind a progress bar, and each result is kept as soon as it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cpcompile.zoo.result import Result, append
from cpcompile.zoo.run import Job, run_job


@dataclass(frozen=True, slots=True)
class Limits:
    """Processes at once, the seconds that one variant may take, and the GiB that one process may hold."""

    num_workers: int
    timeout: float
    memory: float


def run_and_keep(
    jobs: Sequence[Job],
    path: Path,
    console: Console,
    limits: Limits,
    run: Callable[[Job, Callable[[Result], None]], None] = run_job,
    words: Callable[[Job], str] = lambda job: f"{job.key} {job.variants[0].text}",
) -> bool:
    """Run jobs and append their results to a file; tell whether they were not interrupted.

    Args:
        jobs: what to run, in this order.
        path: of the file of results.
        console: of the progress bar, or of one line for each job where it is no terminal.
        limits: of the processes.
        run: what a process does with a job.
        words: what a job is called.
    """
    from cpcompile.zoo.pool import run_jobs

    path.parent.mkdir(parents=True, exist_ok=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=len(jobs))

        def report(job: Job, results: list[Result]) -> None:
            append(path, results)
            progress.update(task, advance=1, description=job.key)
            if not console.is_terminal:
                outcomes = ", ".join(dict.fromkeys(result.outcome for result in results))
                console.print(f"{words(job)}: {outcomes}", markup=False, highlight=False, soft_wrap=True)

        try:
            run_jobs(jobs, report, run=run, **dataclasses.asdict(limits))
        except KeyboardInterrupt:
            console.print(f"interrupted: {path} keeps what is done; continue with --resume.")
            return False
    return True
