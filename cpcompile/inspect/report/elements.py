"""Elements: HTML and SVG by functions, so that every tag is closed and every text is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

VOID = frozenset({"meta", "input"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, /, *children: object, **attributes: Any) -> Markup:
    """Return an element. Children that are no `Markup` are escaped; `class_` is `class`, `text_anchor` is `text-anchor`."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(f"{value:.6g}" if isinstance(value, float) else str(value))}"'
        for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(f"<{name}{given}>")
    return Markup(f"<{name}{given}>{join(children)}</{name}>")


def join(children: Iterable[object]) -> Markup:
    """Return several children as one."""
    return Markup("".join(child if isinstance(child, Markup) else escape(str(child)) for child in children))


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a table that scrolls by itself where it is wider than the page. Numbers and sizes are on the right."""
    lines = [list(row) for row in rows]
    right = [all(str(line[i])[:1].isdigit() or not str(line[i]) for line in lines) for i in range(len(head))]
    classes = ["number" if is_right else "text" for is_right in right]

    def cells(kind: str, row: Sequence[object]) -> list[Markup]:
        return [element(kind, cell, class_=name) for cell, name in zip(row, classes, strict=True)]

    body = [element("tr", *cells("td", line)) for line in lines]
    whole = element("table", element("thead", element("tr", *cells("th", head))), element("tbody", *body))
    return element("div", whole, class_="scroll", tabindex=0)


def legend(entries: Iterable[tuple[str, object]]) -> Markup:
    """Return what colours mean."""
    return element(
        "ul",
        *(
            element("li", element("span", class_="chip", style=f"background:{color}"), label)
            for color, label in entries
        ),
        class_="legend",
    )


def figure(picture: Markup, *caption: object, class_: str = "large") -> Markup:
    """Return a picture with what it shows."""
    return element("figure", picture, element("figcaption", *caption), class_=class_)


def svg(width: float, height: float, *children: object, label: str) -> Markup:
    """Return a picture of this size, which gets smaller with the page; `label` says what it shows."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        style=f"width:{width:g}px",
    )
