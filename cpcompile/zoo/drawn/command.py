"""Command: run drawn configurations, keep their results and write the tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from cpcompile.zoo.drawn.draw import draw
from cpcompile.zoo.drawn.run import draw_of, job_of, run_drawn
from cpcompile.zoo.drawn.summary import markdown
from cpcompile.zoo.progress import Limits, run_and_keep
from cpcompile.zoo.result import Result, read
from cpcompile.zoo.run import Job
from cpcompile.zoo.summary import failures


def run_random(
    indices: Iterable[int],
    seed: int,
    only: str,
    path: Path,
    console: Console,
    limits: Limits,
    device: str = "cpu",
    resume: bool = False,
) -> int:
    """Run the configurations of these indices whose words have the regular expression `only`.

    Returns:
        The exit code: 1 if any of them is wrong or crashes, 130 if interrupted.
    """
    if not resume:
        path.unlink(missing_ok=True)
    wanted = [job_of(drawn, device) for index in indices if re.search(only, (drawn := draw(seed, index)).text)]
    done = {result.key for result in read(path)}
    if not run_and_keep([job for job in wanted if job.key not in done], path, console, limits, run_drawn, words):
        return 130
    results = described(read(path))
    page = markdown(results, device)
    page_path = path.with_suffix(".md")
    page_path.write_text(page)
    console.print(page, markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(results)} results in {path}, tables in {page_path}")
    return 1 if failures(results) else 0


def words(job: Job) -> str:
    """Return what a job is called."""
    return f"{job.key} {draw_of(job.key).text}"


def described(results: Iterable[Result]) -> list[Result]:
    """Return results that all say their configuration, those of processes that ended too, in the order of the indices."""
    found = [r if r.drawn else dataclasses.replace(r, drawn=draw_of(r.key).text) for r in results]
    return sorted(found, key=lambda r: [int(part) for part in r.key.split(":")])
