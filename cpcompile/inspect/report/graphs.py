"""Graphs: the program after each stage, folded by layer, equal layers once, and a field to search them."""

from __future__ import annotations

from cpcompile.inspect.folded_graph import Block, Section, sections
from cpcompile.inspect.report.elements import Markup, element, join


def graphs(stages: dict[str, str]) -> Markup:
    """Return the listing of each stage by its title."""
    field = element(
        "input",
        type="search",
        id="search",
        placeholder="search: an operator, a name, a line of the model",
        aria_label="search the graphs",
    )
    told = element("p", id="found", role="status")
    return join([field, told, element("div", *(stage(*each) for each in stages.items()), id="graph")])


def stage(title: str, listing: str) -> Markup:
    """Return one stage."""
    found = sections(listing)
    count = sum(part.num_statements * max(1, len(part.layers)) for part in found)
    head = element("summary", title, " ", element("small", f"{count} statements"))
    return element("details", head, *map(section, found), class_="stage")


def section(part: Section) -> Markup:
    """Return a layer, or what is between layers."""
    times = f"{len(part.layers)} equal layers, the first is shown; " if len(part.layers) > 1 else ""
    head = element("summary", part.title, " ", element("small", f"{times}{part.num_statements} statements"))
    code = element("div", element("div", *map(block, part.blocks)), class_="code", tabindex=0)
    return element("details", head, code)


def block(found: Block) -> Markup:
    """Return a line of the model and what it became."""
    source = (element("code", found.source, class_="source"),) if found.source else ()
    return element("div", *source, *map(statement, found.statements), class_="block")


def statement(line: str) -> Markup:
    """Return a line of code; operators of ranks stand out."""
    return element("code", line, class_="collective") if " = cp." in line else element("code", line)
