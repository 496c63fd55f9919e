"""Report: the results as a page of Markdown and as tables on a terminal."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

import cpcompile
from cpcompile.zoo.build import import_transformers
from cpcompile.zoo.programs import find_programs
from cpcompile.zoo.programs.making import CATALOGUES
from cpcompile.zoo.result import CRASH, EXACT, NOT_AVAILABLE, NOT_CAPTURED, REFUSED, WRONG, Result
from cpcompile.zoo.summary import Cell, Counts, Table, by_category, failures, reasons, tabulate

COLUMNS = (
    "captured",
    "exact",
    "of captured",
    "replicated",
    "whole",
    "refused",
    "wrong",
    "crash",
    "not captured",
    "not available",
)


def introduction(catalogues: Sequence[str]) -> Iterator[str]:
    """Yield the head of the page, up to how entries are built."""
    if not catalogues:
        yield from ("# Model zoo", "", "Written by `python -m cpcompile.zoo`; do not edit.")
        yield "Every architecture is built from a tiny random configuration"
        return
    command = " ".join(["python -m cpcompile.zoo", *(f"--catalogue {name}" for name in catalogues)])
    yield from ("# Beyond the model zoo", "", f"Written by `{command}`; do not edit.")
    yield "Programs beyond transformers' models, as people write them: each is tiny, with random parameters,"


def catalogues_of(results: Sequence[Result]) -> list[str]:
    """Return the catalogues of programs that results have."""
    programs = [result.key for result in results if not result.variant.attention]  # models have "vision:" as well
    return [name for name in CATALOGUES if any(key.startswith(f"{name}:") for key in programs)]


def coverage(results: Sequence[Result]) -> str:
    """Return how many programs of the catalogues have results, where not all have; else ''."""
    expected = set(find_programs(catalogues_of(results)))
    found = expected & {result.key for result in results}
    return f" Only {len(found)} of {len(expected)} programs were run." if len(found) < len(expected) else ""


def versions(results: Sequence[Result], device: str) -> str:
    """Return what was run, in words."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    names = {
        "cpcompile": cpcompile.__version__,
        "torch": torch.__version__,
        "transformers": import_transformers().__version__,
    }
    used = {"diffusion": "diffusers", "vision": "timm"}
    names |= {used[name]: version_of(used[name]) for name in catalogues_of(results) if name in used}
    names["Python"] = platform.python_version()
    return ", ".join([hardware, *(f"{name} {version}" for name, version in names.items())])


def version_of(package: str) -> str:
    """Return the version of a package that may be missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def row(counts: Counts) -> list[str]:
    """Return the numbers of one row, in the order of `COLUMNS`."""
    rest = [counts[outcome] for outcome in (REFUSED, WRONG, CRASH, NOT_CAPTURED, NOT_AVAILABLE)]
    return [
        str(counts.captured),
        str(counts[EXACT]),
        counts.rate,
        str(counts.replicated),
        str(counts.whole),
        *map(str, rest),
    ]


def show(console: Console, results: Sequence[Result]) -> None:
    """Print the counts of each variant, and the first failures."""
    table = RichTable(box=box.SIMPLE)
    table.add_column("variant")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for variant, cells in tabulate(results).items():
        table.add_row(variant, *row(Counts.of(cells.values())))
    console.print(table)
    for result in failures(results)[:20]:
        where = f"{result.key} ({result.variant.text}, {result.variant.world_size} ranks)"
        console.print(f"{result.outcome}: {where}: {result.reason}", markup=False, highlight=False, soft_wrap=True)


def markdown(results: Sequence[Result], device: str = "cpu") -> str:
    """Return the page."""
    table = tabulate(results)
    ranks = sorted({result.variant.world_size for result in results})
    lines = [
        *introduction(catalogues_of(results)),
        "and run by `cpcompile.verify` (loss and every gradient against the untouched model) in its own process.",
        "",
        f"{versions(results, device)}; ranks: {', '.join(map(str, ranks))}.",
        f"An entry counts by its worst result over the numbers of ranks.{coverage(results)}",
        "",
        "- *captured*: the model runs on one device and Dynamo traces it as one graph; the next four add up to it.",
        "- *exact*: loss and every gradient agree, to 1e-10 in float64 or, where the model does not run in float64 on one",
        "  device, to 256 units in the last place of float32. *replicated*: exact, but nothing could be sharded.",
        "  *whole*: exact, and every rank computes so many attentions whole; in the counts, entries with any.",
        "  *eval*: in evaluation mode, because in training mode the model draws random numbers.",
        "- *refused*: an error at compile time that says why. *wrong*, *crash*: defects.",
        "- *not captured*: fails on one device, or has a graph break. *not available*: transformers has no such class, or the",
        "  class does not offer the variant, or the package of the entry is not installed.",
        "",
        "## Counts",
        "",
        *counts_table(table),
    ]
    for title, outcome in (("Refused", REFUSED), ("Wrong", WRONG), ("Crash", CRASH), ("Not captured", NOT_CAPTURED)):
        lines += ["", f"## {title}", "", *reasons_list(table, outcome, title[0])]
    lines += ["", "## Entries", "", *entries_table(table)]
    return "\n".join(lines) + "\n"


def compact(results: Sequence[Result], device: str = "cpu") -> str:
    """Return the results as JSON, one entry a line, over all numbers of ranks as on the page."""
    table = tabulate(results)
    lines = []
    for key in sorted({key for cells in table.values() for key in cells}):
        row = {variant: describe(cells[key]) for variant, cells in table.items() if key in cells}
        lines.append(f"    {json.dumps(key)}: {json.dumps(row)}")
    ranks = sorted({result.variant.world_size for result in results})
    head = f'{{\n  "versions": {json.dumps(versions(results, device))},\n  "ranks": {ranks},\n  "entries": {{\n'
    return head + ",\n".join(lines) + "\n  }\n}\n"


def describe(cell: Cell) -> dict[str, Any]:
    """Return what the compact results keep of a cell."""
    worst = cell.worst
    values: dict[str, Any] = {"outcome": worst.outcome, "reason": worst.reason}
    if cell.outcome == EXACT:
        values |= {"dtype": worst.dtype, "error": cell.error, "gradients": worst.num_gradients, "sites": worst.sites}
        values |= {name: getattr(worst, name) for name in ("replicated", "whole", "evaluation") if getattr(worst, name)}
    return {name: value for name, value in values.items() if value != ""}


def counts_table(table: Table) -> Iterator[str]:
    """Yield the table of counts by variant and category."""
    yield from header("variant", "category", *COLUMNS)
    for variant, cells in table.items():
        for category, counts in by_category(cells).items():
            yield line(variant, category, *row(counts))


def reasons_list(table: Table, outcome: str, letter: str) -> Iterator[str]:
    """Yield the reasons of an outcome, numbered, with the entries that have them."""
    found = reasons(table, outcome)
    if not found:
        yield "None."
    variants = list(table)
    for number, (reason, entries) in enumerate(found.items(), start=1):
        yield f"- **{letter}{number}** ({len(entries)}) `{reason}`"
        names = ", ".join(sorted({key.split(":")[1] for key in entries}))
        some = sorted({variant for used in entries.values() for variant in used}, key=variants.index)
        suffix = "" if len(some) == len(variants) else f" ({'; '.join(some)})"
        yield f"  {names}{suffix}"


def entries_table(table: Table) -> Iterator[str]:
    """Yield the table of all entries: the largest error, or the number of the reason."""
    numbers: dict[tuple[str, str], str] = {}
    for outcome, letter in ((REFUSED, "R"), (WRONG, "W"), (CRASH, "C"), (NOT_CAPTURED, "N")):
        for number, reason in enumerate(reasons(table, outcome), start=1):
            numbers[outcome, reason] = f"{letter}{number}"
    yield from header("entry", *table)
    for key in sorted({key for cells in table.values() for key in cells}):
        yield line(key, *(cell_text(cells.get(key), numbers) for cells in table.values()))


def cell_text(cell: Cell | None, numbers: Mapping[tuple[str, str], str]) -> str:
    """Return one cell of the table of entries."""
    if cell is None:
        return ""
    match cell.outcome:
        case "exact":
            note = ", replicated" if cell.worst.replicated else ""
            note += f", {cell.worst.whole} whole" if cell.worst.whole else ""
            note += ", eval" if cell.worst.evaluation else ""
            return f"{cell.error:.0e}{' (float32)' if cell.worst.dtype == 'float32' else ''}{note}"
        case "not available":
            return "-"
    return numbers[cell.outcome, cell.worst.reason]


def header(*titles: str) -> Iterator[str]:
    """Yield the head of a Markdown table."""
    yield line(*titles)
    yield line(*("---" for _ in titles))


def line(*cells: Any) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
