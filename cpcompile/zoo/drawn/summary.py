"""Summary: many drawn configurations as tables, and each failure with what runs it alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from cpcompile.zoo.drawn.run import draw_of
from cpcompile.zoo.report import header, line, versions
from cpcompile.zoo.result import CRASH, NOT_AVAILABLE, NOT_CAPTURED, OUTCOMES, REFUSED, WRONG, Result

TITLES = {
    WRONG: "Wrong",
    CRASH: "Crash",
    REFUSED: "Refused",
    NOT_CAPTURED: "Not traceable",
    NOT_AVAILABLE: "Not available",
}


def markdown(results: Sequence[Result], device: str = "cpu") -> str:
    """Return the page: counts by strategy and head, reasons by frequency, and failures one by one."""
    lines = [
        "# Random configurations",
        "",
        "Written by `python -m cpcompile.zoo --random N`; do not edit. Architecture, head, sizes, inputs, strategy, layout",
        "and ranks are drawn; loss and every gradient are compared with the untouched model in float64.",
        "",
        f"{versions(results, device)}.",
        "",
        *counts(results),
    ]
    for outcome in (WRONG, CRASH):
        lines += ["", f"## {TITLES[outcome]}", "", *failures_list(results, outcome)]
    for outcome in (REFUSED, NOT_CAPTURED, NOT_AVAILABLE):
        lines += ["", f"## {TITLES[outcome]}", "", *reasons_list(results, outcome)]
    return "\n".join(lines) + "\n"


def counts(results: Sequence[Result]) -> Iterator[str]:
    """Yield the table of counts, of all and by what was drawn."""
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        drawn = draw_of(result.key)
        names = ("all", f"P={drawn.world_size}", str(drawn.options["strategy"]), drawn.head or drawn.entry.category)
        for name in names:
            groups[name][result.outcome] += 1
    yield from header("", *OUTCOMES)
    for name, found in sorted(groups.items(), key=lambda item: (-item[1].total(), item[0])):
        yield line(name, *(found[outcome] for outcome in OUTCOMES))


def failures_list(results: Sequence[Result], outcome: str) -> Iterator[str]:
    """Yield the results of an outcome: what it is, why it failed, and the command that runs it."""
    found = [result for result in results if result.outcome == outcome]
    if not found:
        yield "None."
    for result in found:
        yield f"- {result.drawn}"
        yield f"  {result.reason}"
        yield f"  `{draw_of(result.key).command}`"


def reasons_list(results: Sequence[Result], outcome: str) -> Iterator[str]:
    """Yield the reasons of an outcome with their counts and one index each, the most frequent first."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome == outcome:
            groups[result.reason].append(result)
    if not groups:
        yield "None."
    for reason, found in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        entries = sorted({draw_of(result.key).entry.name for result in found})
        some = ", ".join(entries[:6]) + (f" and {len(entries) - 6} more" if len(entries) > 6 else "")
        yield f"- {len(found)} x `{reason}`"
        yield f"  {some}; {found[0].key} is one"
