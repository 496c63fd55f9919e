"""Timeline: the page of an interactive picture of a trace, which needs no network and no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cpcompile.inspect.plots.trace import COLORS
from cpcompile.inspect.report.elements import Markup, element, legend
from cpcompile.inspect.report.style import STYLE
from cpcompile.inspect.report.timeline_script import SCRIPT, TIMELINE_STYLE
from cpcompile.inspect.timeline import Track, to_data

OF_KINDS = {**COLORS, "layer": "#59a14f"}
HELP = (
    "Drag to move, double-click or press + and - to zoom, or turn the wheel with Ctrl held; with two fingers on a touch screen. "
    "Arrow keys move, 0 shows all, Enter goes to the next hit, Escape clears the search. Point at a bar, or tap it, to read it."
)
BUTTONS = {"in": "zoom in", "out": "zoom out", "all": "show all", "back": "previous hit", "next": "next hit"}


def timeline_page(tracks: Sequence[Track], title: str) -> str:
    """Return tracks as an HTML document."""
    data = json.dumps(to_data(tracks) | {"colors": OF_KINDS}, separators=(",", ":")).replace("<", "\\u003c")
    count = sum(len(track.bars) for track in tracks)
    name = f"Timeline of {title}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", name),
        element("style", STYLE, TIMELINE_STYLE),
    )
    field = element(
        "input",
        type="search",
        id="search",
        placeholder="search: a kernel, an operator, a layer",
        aria_label="search the timeline",
    )
    buttons = [element("button", label, type="button", id=f"zoom-{key}") for key, label in BUTTONS.items()]
    told = element("span", id="found", role="status")
    main = element(
        "main",
        element("div", field, *buttons, told, class_="tools"),
        legend((color, kind) for kind, color in OF_KINDS.items()),
        element(
            "div",
            element("canvas", id="timeline", tabindex=0, role="img", aria_label=f"{name}; {HELP}"),
            element("div", id="tip", hidden=""),
            class_="picture",
        ),
        element("p", id="picked", role="status"),
        element("p", HELP),
        element("footer", "Made by cpcompile."),
    )
    top = element("header", element("h1", name), element("p", f"{count} events in {len(tracks)} rows"))
    stored = element("script", Markup(data), type="application/json", id="data")
    body = element("body", top, main, stored, element("script", SCRIPT))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
