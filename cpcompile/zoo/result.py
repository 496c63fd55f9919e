"""Results: what came out of one variant of one entry, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

EXACT = "exact"
REFUSED = "refused"
WRONG = "wrong"
CRASH = "crash"
NOT_CAPTURED = "not captured"
NOT_AVAILABLE = "not available"
OUTCOMES = (EXACT, REFUSED, WRONG, CRASH, NOT_CAPTURED, NOT_AVAILABLE)
# The model runs on one device and is one graph: what becomes of it is up to cpcompile.
CAPTURED = (EXACT, REFUSED, WRONG, CRASH)


@dataclass(frozen=True, slots=True)
class Variant:
    """How an entry is run.

    Attributes:
        attention: transformers' name of the attention implementation; '' for a program, which has its own.
        packed: positions restart with each document.
        world_size: ranks.
        strict: hidden states may not be gathered.
    """

    attention: str
    packed: bool
    world_size: int
    strict: bool

    @property
    def text(self) -> str:
        """The variant as a column says it, without the number of ranks."""
        of_model = f"{self.attention}, {'packed' if self.packed else 'dense'}, " if self.attention else ""
        return f"{of_model}{'strict' if self.strict else 'not strict'}"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one variant of one entry.

    Attributes:
        key: of the entry.
        variant: how it was run.
        outcome: one of `OUTCOMES`.
        reason: why it is not exact, without what differs between models of one cause.
        detail: the message and the line that it names, or the node that differs.
        dtype: in which the comparison was made.
        loss_error: relative.
        gradient_error: relative, of the worst parameter among those with a gradient.
        num_gradients: parameters whose gradient is not zero on one device.
        sites: attentions that were rewritten.
        replicated: nothing was sharded.
        whole: attentions that every rank computes whole.
        evaluation: compared in evaluation mode, because in training mode the model draws random numbers.
        seconds: of this variant.
        drawn: the configuration in words, of one drawn at random.
    """

    key: str
    variant: Variant
    outcome: str
    reason: str = ""
    detail: str = ""
    dtype: str = ""
    loss_error: float | None = None
    gradient_error: float | None = None
    num_gradients: int = 0
    sites: int = 0
    replicated: bool = False
    whole: int = 0
    evaluation: bool = False
    seconds: float = 0.0
    drawn: str = ""

    @property
    def id(self) -> tuple[str, Variant]:
        """What tells this result from the others."""
        return self.key, self.variant

    def to_line(self) -> str:
        """Return the result as a line of JSON, without what is empty."""
        values = {"key": self.key, **dataclasses.asdict(self.variant)}
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("key", "variant")}
        return json.dumps(values | {name: value for name, value in rest.items() if value or name == "outcome"})

    @classmethod
    def from_line(cls, line: str) -> Result:
        """Return the result that `to_line` wrote."""
        values = json.loads(line)
        names = [f.name for f in dataclasses.fields(Variant)]
        return cls(variant=Variant(**{name: values.pop(name) for name in names}), **values)


def append(path: Path, results: Iterable[Result]) -> None:
    """Add results to the file, a line each."""
    with path.open("a") as file:
        file.writelines(result.to_line() + "\n" for result in results)


def read(path: Path) -> list[Result]:
    """Return the results in the file, the last of each variant; a line that was cut off is left out."""
    return list({result.id: result for result in _lines(path)}.values())


def _lines(path: Path) -> Iterator[Result]:
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield Result.from_line(line)
        except ValueError:
            continue
