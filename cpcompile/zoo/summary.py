"""Summary: results of single variants become counts, rates and reasons by frequency."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cpcompile.zoo.catalogue import CATEGORIES
from cpcompile.zoo.programs.making import CATALOGUES
from cpcompile.zoo.result import CAPTURED, CRASH, EXACT, NOT_AVAILABLE, NOT_CAPTURED, REFUSED, WRONG, Result

# The outcome of an entry is the first of these that some number of ranks has.
_WORST_FIRST = (WRONG, CRASH, REFUSED, NOT_CAPTURED, NOT_AVAILABLE, EXACT)


@dataclass(frozen=True, slots=True)
class Cell:
    """One entry in one variant, over all numbers of ranks: the worst result, and the largest errors."""

    worst: Result
    error: float

    @property
    def outcome(self) -> str:
        """The worst outcome."""
        return self.worst.outcome


Table = Mapping[str, Mapping[str, Cell]]


def tabulate(results: Iterable[Result]) -> Table:
    """Return the cells by variant and entry."""
    groups: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.variant.text, result.key].append(result)
    table: dict[str, dict[str, Cell]] = defaultdict(dict)
    for (variant, key), group in groups.items():
        worst = min(group, key=lambda r: _WORST_FIRST.index(r.outcome))
        error = max(max(r.loss_error or 0.0, r.gradient_error or 0.0) for r in group)
        table[variant][key] = Cell(worst, error)
    return {variant: dict(sorted(table[variant].items())) for variant in sorted(table, key=order_of_variant)}


def order_of_variant(text: str) -> tuple[int, str]:
    """Return what sorts variants: sdpa first, dense before packed."""
    names = ("sdpa", "eager", "flex_attention")
    return next((i for i, name in enumerate(names) if text.startswith(name)), len(names)), text


@dataclass(frozen=True, slots=True)
class Counts:
    """How many entries have each outcome."""

    by_outcome: Mapping[str, int]
    replicated: int
    whole: int

    @classmethod
    def of(cls, cells: Iterable[Cell]) -> Counts:
        """Count cells."""
        cells = list(cells)
        exact = [cell.worst for cell in cells if cell.outcome == EXACT]
        replicated, whole = sum(r.replicated for r in exact), sum(r.whole > 0 for r in exact)
        return cls(Counter(cell.outcome for cell in cells), replicated, whole)

    def __getitem__(self, outcome: str) -> int:
        return self.by_outcome.get(outcome, 0)

    @property
    def captured(self) -> int:
        """Entries that are one graph."""
        return sum(self[outcome] for outcome in CAPTURED)

    @property
    def rate(self) -> str:
        """Exact among captured."""
        return f"{100 * self[EXACT] / self.captured:.0f}%" if self.captured else "-"


def by_category(cells: Mapping[str, Cell]) -> dict[str, Counts]:
    """Return the counts of each category, and of all."""
    groups = {
        category: [cell for key, cell in cells.items() if key.startswith(f"{category}:")]
        for category in (*CATEGORIES, *CATALOGUES)
    }
    return {name: Counts.of(group) for name, group in groups.items() if group} | {"all": Counts.of(cells.values())}


def reasons(table: Table, outcome: str) -> dict[str, dict[str, list[str]]]:
    """Return, for each reason of an outcome, the variants of each entry that has it; reasons of most entries first."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for variant, cells in table.items():
        for key, cell in cells.items():
            if cell.outcome == outcome:
                found[cell.worst.reason][key].append(variant)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def failures(results: Iterable[Result]) -> list[Result]:
    """Return what must not be: wrong results and crashes."""
    return [result for result in results if result.outcome in (WRONG, CRASH)]
