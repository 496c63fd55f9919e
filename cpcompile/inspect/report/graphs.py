"""Graphs: the program after each stage, folded by layer, equal layers once, and a field to search them."""

from __future__ import annotations

from collections.abc import Set

from cpcompile.inspect.difference import without_type
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
    before = [set[str](), *(statements_of(listing) for listing in stages.values())]
    parts = [stage(title, listing, old) for (title, listing), old in zip(stages.items(), before, strict=False)]
    return join([field, told, element("div", *parts, id="graph")])


def statements_of(listing: str) -> set[str]:
    """Return the statements of a listing; one that only got another placement is the same."""
    return {without_type(line) for line in listing.split("\n") if line and not line.startswith("# ")}


def stage(title: str, listing: str, before: Set[str]) -> Markup:
    """Return one stage; `before` are the statements of the one before, none for the first."""
    now, parts = statements_of(listing), sections(listing)
    count = sum(part.num_statements * max(1, len(part.layers)) for part in parts)
    changes = f", {len(now - before)} new, {len(before - now)} gone" if before else ""
    head = element("summary", title, " ", element("small", f"{count} statements{changes}"))
    return element("details", head, *(section(part, before or now) for part in parts), class_="stage")


def section(part: Section, before: Set[str]) -> Markup:
    """Return a layer, or what is between layers."""
    times = f"{len(part.layers)} equal layers, the first is shown; " if len(part.layers) > 1 else ""
    count = sum(without_type(line) not in before for each in part.blocks for line in each.statements)
    told = f"{times}{part.num_statements} statements{f', {count} new' if count else ''}"
    head = element("summary", part.title, " ", element("small", told))
    blocks = (block(each, before) for each in part.blocks)
    return element("details", head, element("div", element("div", *blocks), class_="code", tabindex=0))


def block(found: Block, before: Set[str]) -> Markup:
    """Return a line of the model and what it became."""
    source = (element("code", found.source, class_="source"),) if found.source else ()
    return element("div", *source, *(statement(line, before) for line in found.statements), class_="block")


def statement(line: str, before: Set[str]) -> Markup:
    """Return a line of code; operators of ranks stand out, and so does what the stage before has not."""
    classes = ["collective"] * (" = cp." in line) + ["new"] * (without_type(line) not in before)
    return element("code", line, **({"class_": " ".join(classes)} if classes else {}))
