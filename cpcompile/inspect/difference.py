"""Difference: what a transformation changes in the code of a graph, as people read a patch."""

from __future__ import annotations

import difflib
import re
import sys

from rich.console import Console
from rich.text import Text

CONTEXT = 2  # lines around a change
_STYLES = {"+": "green", "-": "red", "@": "cyan", "#": "dim"}
_TYPE = re.compile(r"^(\w+): (\w+\[[^\]]*\](?: \S+\(.*?\))?) = ")


def difference(before: str, after: str, context: int = CONTEXT) -> list[str]:
    """Return the lines of a patch from one listing to another, with the user's lines kept as comments.

    A statement whose placement alone changed is no change: nearly every value becomes sharded.
    """
    old, new = before.splitlines(), after.splitlines()
    bare_old, bare_new = ([without_type(line) for line in lines] for lines in (old, new))
    found: list[str] = []
    matcher = difflib.SequenceMatcher(None, bare_old, bare_new, autojunk=False)
    for group in matcher.get_grouped_opcodes(context):
        heading = _heading(new, group[0][3])
        found.append(f"@@ {heading}" if heading else "@@")
        for kind, first, last, begin, end in group:
            if kind == "equal":
                found += [f"  {line}" for line in new[begin:end]]
                continue
            found += [f"- {line}" for line in old[first:last] if line]
            found += [f"+ {line}" for line in new[begin:end] if line]
    return found


def without_type(line: str) -> str:
    """Return a statement without dtype, shape and placement of its value."""
    return _TYPE.sub(r"\1 = ", line)


def _heading(lines: list[str], place: int) -> str:
    """Return the user's line above a place of a listing."""
    return next(
        (lines[i].removeprefix("# ") for i in range(min(place, len(lines) - 1), -1, -1) if lines[i][:1] == "#"), ""
    )


def print_difference(before: str, after: str, context: int = CONTEXT) -> None:
    """Print a patch, coloured where the output is a terminal."""
    console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
    for line in difference(before, after, context):
        is_comment = line[2:3] == "#"
        console.print(Text(line, style=_STYLES.get("#" if is_comment else line[:1], "")))
