"""Folded graph: the listing of a graph cut at the layers of the model, equal ones once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from cpcompile.ir.folding import grouped, one_path

_HEAD = re.compile(r"^# .*, in (?P<module>[\w.]+)$")
_LAYER = re.compile(r"^(?P<path>.*?\.\d+|\d+)(?:\.|$)")
_WORD = re.compile(r"[A-Za-z_][\w.]*")
_MADE = re.compile(r"^(\w+)(?:: .*?)? = ")


@dataclass(frozen=True, slots=True)
class Block:
    """A line of the model as a comment, '' for what comes from none, and the statements that it became."""

    source: str
    statements: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The path of the outermost numbered module around it, or ''."""
        head = _HEAD.match(self.source)
        found = _LAYER.match(head["module"]) if head else None
        return found["path"] if found else ""


@dataclass(frozen=True, slots=True)
class Section:
    """Neighbouring blocks of one layer, or of what is in none.

    Attributes:
        layers: the paths of all layers that are equal to it; () outside of layers.
        blocks: those of the first.
    """

    layers: tuple[str, ...]
    blocks: tuple[Block, ...]

    @property
    def title(self) -> str:
        """Which layers it is."""
        if not self.layers:
            return "outside of layers"
        return one_path(self.layers) or f"{self.layers[0]} to {self.layers[-1]}"

    @property
    def num_statements(self) -> int:
        """How many statements one of them has."""
        return sum(len(block.statements) for block in self.blocks)


def sections(listing: str) -> list[Section]:
    """Return the parts of a listing as `graph_listing.listing` writes it. Equal layers are where the first of them is."""
    parts: list[Section] = []
    for block in blocks(listing):
        layers = (block.layer,) if block.layer else ()
        if parts and parts[-1].layers == layers:
            parts[-1] = Section(layers, (*parts[-1].blocks, block))
        else:
            parts.append(Section(layers, (block,)))
    statements = (line for part in parts for block in part.blocks for line in block.statements)
    made = {found[1] for line in statements if (found := _MADE.match(line))}
    numbered = list(enumerate(parts))
    groups = grouped(numbered, key=lambda part: meaning(part[1], made) if part[1].layers else part[0])
    return [Section(tuple(path for _, part in group for path in part.layers), group[0][1].blocks) for group in groups]


def blocks(listing: str) -> Iterator[Block]:
    """Yield the blocks of a listing; a block without a comment is of the source before it."""
    for text in filter(None, listing.split("\n\n")):
        first, *rest = text.split("\n")
        yield Block(first, tuple(rest)) if first.startswith("# ") else Block("", (first, *rest))


def meaning(section: Section, made: AbstractSet[str]) -> str:
    """Return the text of a layer with names of the values in `made` that do not depend on which one it is."""
    names: dict[str, str] = {}
    own_path = re.compile(rf"(?<![\w.]){re.escape(section.layers[0])}(?!\w)")

    def rename(word: re.Match[str]) -> str:
        is_operator = word.string[word.end() :].startswith("(")
        return word[0] if is_operator or word[0] not in made else names.setdefault(word[0], f"${len(names)}")

    lines: list[str] = []
    for block in section.blocks:
        lines.append(own_path.sub("@", block.source))
        # The path of a parameter is that of its module.
        lines += [_WORD.sub(rename, own_path.sub("@", line)) for line in block.statements]
    return "\n".join(lines)
