"""Draw the architecture: `python docs/draw_architecture.py` writes docs/architecture.svg from the code.

One row for each layer of the contract "Imports point down" in pyproject.toml, one box for each room, with the first sentence of
its docstring and its number of modules. An arrow is a real import; those that follow from others are left out.
"""

from __future__ import annotations

import ast
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGE = "cpcompile"

# In pixels.
WIDTH, BOX, BETWEEN, LINE, PADDING, BELOW = 1240, 360, 50, 18, 12, 44
LANE = 12  # between arrows that go through the same gap
CHARACTERS = 54  # of a line in a box
STYLE = (
    "text{font-family:Helvetica,Arial,sans-serif;font-size:13px;fill:#24292f}"
    ".name{font-size:16px;font-weight:bold}.count{fill:#57606a}"
    "rect{fill:#f6f8fa;stroke:#8c959f}.page{fill:#ffffff;stroke:none}path.import{fill:none;stroke:#0969da;stroke-width:1.4}"
)

Arrow = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Room:
    """A folder or a single module of the package: its first sentence, and how many modules each folder of it has."""

    name: str
    sentence: str
    counts: Mapping[str, int]

    @property
    def lines(self) -> list[str]:
        """The text of its box below the name."""
        folders = ", ".join(f"{name}/\N{NO-BREAK SPACE}{count}" for name, count in sorted(self.counts.items()) if name)
        return textwrap.wrap(self.sentence, CHARACTERS) + textwrap.wrap(folders, CHARACTERS)

    @property
    def title(self) -> str:
        """Its name, and its modules in all."""
        total = sum(self.counts.values())
        return f"{total} modules" if total > 1 else "1 module"


def modules() -> dict[str, ast.Module]:
    """Return every module of the package by name. The passes lie in a folder of their own, to which cpcompile/passes links."""
    found = {}
    for top, name in ((ROOT / PACKAGE, PACKAGE), (ROOT / "passes", f"{PACKAGE}.passes")):
        for path in sorted(top.rglob("*.py")):
            inside = path.relative_to(top).with_suffix("").parts
            if name == PACKAGE and inside[0] == "passes":
                continue
            found[".".join((name, *(part for part in inside if part != "__init__")))] = ast.parse(path.read_text())
    return found


def room_of(module: str) -> str:
    """Return the room of a module; '' for the package itself."""
    return module.split(".")[1] if "." in module else ""


def layers() -> list[list[str]]:
    """Return the rooms of each layer, top to bottom."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def rooms(trees: Mapping[str, ast.Module]) -> dict[str, Room]:
    """Return every room by name. A folder's `__init__` is not counted, a room that is one module is."""
    found = {}
    for name in sorted({room_of(module) for module in trees} - {""}):
        inside = [module for module in trees if module.startswith(f"{PACKAGE}.{name}.")]
        counts: dict[str, int] = {}
        for module in inside:
            folder = module.split(".")[2] if module.count(".") > 2 else ""
            is_folder = any(other.startswith(f"{module}.") for other in trees)
            counts[folder] = counts.get(folder, 0) + (not is_folder)
        text = ast.get_docstring(trees[f"{PACKAGE}.{name}"]) or ""
        sentence = text.splitlines()[0].partition(". ")[0].rstrip(".").replace("`", "") + "."
        found[name] = Room(name, sentence, counts or {"": 1})
    return found


def imports(trees: Mapping[str, ast.Module]) -> set[Arrow]:
    """Return which room imports which. A name of the package itself counts as an import of the room that it comes from."""
    public = {
        alias.name: room_of(node.module)
        for node in ast.walk(trees[PACKAGE])
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def imported(node: ast.AST) -> Iterator[str]:
        match node:
            case ast.ImportFrom(module=str(module)) if module == PACKAGE:
                yield from (public.get(alias.name, alias.name) for alias in node.names)
            case ast.ImportFrom(module=str(module)) if module.startswith(f"{PACKAGE}."):
                yield room_of(module)
            case ast.Import():
                yield from (room_of(alias.name) for alias in node.names if alias.name.startswith(f"{PACKAGE}."))
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if name == PACKAGE and attribute in public:
                yield public[attribute]

    found = {
        (room_of(module), to) for module, tree in trees.items() for node in ast.walk(tree) for to in imported(node)
    }
    names = {room_of(module) for module in trees}
    return {(room, to) for room, to in found if room and to in names and room != to}


def reduced(arrows: set[Arrow]) -> list[Arrow]:
    """Return the arrows that do not follow from others."""
    after: dict[str, set[str]] = {}
    for start, end in arrows:
        after.setdefault(start, set()).add(end)

    def reached(room: str) -> set[str]:
        return {x for to in after.get(room, ()) for x in {to, *reached(to)}}

    return sorted((a, b) for a, b in arrows if not any(b in reached(other) for other in after[a] - {b}))


@dataclass(frozen=True, slots=True)
class Box:
    """Where a room is drawn: its layer, its left edge, its top and its height."""

    layer: int
    left: float
    top: float
    height: float

    @property
    def middle(self) -> float:
        """Of its width."""
        return self.left + BOX / 2


def placed(found: Mapping[str, Room]) -> tuple[dict[str, Box], float]:
    """Return the box of each room, and the height of the picture."""
    boxes, top = {}, 20.0
    for number, names in enumerate(layers()):
        height = LINE * (1 + max(len(found[name].lines) for name in names)) + 2 * PADDING
        left = (WIDTH - len(names) * BOX - (len(names) - 1) * BETWEEN) / 2
        for i, name in enumerate(names):
            boxes[name] = Box(number, left + i * (BOX + BETWEEN), top, height)
        top += height + BELOW
    return boxes, top - BELOW + 20


def paths(arrows: list[Arrow], boxes: Mapping[str, Box]) -> Iterator[str]:
    """Yield the path of each arrow: straight down, or through the gaps between the boxes of the layers that it skips."""
    through = gaps(arrows, boxes)
    leaving, arriving = ends(arrows, boxes, through, 0), ends(arrows, boxes, through, -1)
    for start, end in arrows:
        above, below = boxes[start], boxes[end]
        points = [(leaving[start, end], above.top + above.height)]
        for layer, x in through[start, end].items():
            skipped = next(box for box in boxes.values() if box.layer == layer)
            points += [(x, skipped.top - 4), (x, skipped.top + skipped.height + 4)]
        yield drawn([*points, (arriving[start, end], below.top - 6)])


def gaps(arrows: list[Arrow], boxes: Mapping[str, Box]) -> dict[Arrow, dict[int, float]]:
    """Return where each arrow goes through each layer that it skips; arrows of one gap lie beside each other.

    Raises:
        ValueError: an import points up.
    """
    found: dict[Arrow, dict[int, float]] = {arrow: {} for arrow in arrows}
    users: dict[tuple[int, float], list[Arrow]] = {}
    for start, end in arrows:
        above, below = boxes[start], boxes[end]
        if above.layer >= below.layer:
            raise ValueError(f"{start} imports {end}, which is not below it")
        for layer in range(above.layer + 1, below.layer):
            row = [box for box in boxes.values() if box.layer == layer]
            between = [row[0].left - BETWEEN / 2, *(box.left + BOX + BETWEEN / 2 for box in row)]
            share = (layer - above.layer) / (below.layer - above.layer)
            wanted = above.middle + share * (below.middle - above.middle)
            gap = min(between, key=lambda x: (abs(x - wanted), x))
            users.setdefault((layer, gap), []).append((start, end))
    for (layer, gap), beside in users.items():
        beside.sort(key=lambda arrow: (boxes[arrow[0]].middle + boxes[arrow[1]].middle, arrow))
        for i, arrow in enumerate(beside):
            found[arrow][layer] = gap + LANE * (i - (len(beside) - 1) / 2)
    return found


def ends(
    arrows: list[Arrow], boxes: Mapping[str, Box], through: Mapping[Arrow, Mapping[int, float]], side: int
) -> dict[Arrow, float]:
    """Return where each arrow leaves its box (side 0) or reaches it (side -1): spread over its width, so that few cross."""

    def towards(arrow: Arrow) -> tuple[float, Arrow]:
        between = list(through[arrow].values())
        return (between[side] if between else boxes[arrow[-1 - side]].middle), arrow

    found = {}
    for name, box in boxes.items():
        own = sorted((arrow for arrow in arrows if arrow[side] == name), key=towards)
        for i, arrow in enumerate(own, 1):
            found[arrow] = box.left + BOX * i / (len(own) + 1)
    return found


def drawn(points: list[tuple[float, float]]) -> str:
    """Return a path that leaves and reaches every point upright."""
    (x, y), *others = points
    steps = [f"M{x:.0f} {y:.0f}"]
    for next_x, next_y in others:
        middle = (y + next_y) / 2
        steps.append(f"C{x:.0f} {middle:.0f} {next_x:.0f} {middle:.0f} {next_x:.0f} {next_y:.0f}")
        x, y = next_x, next_y
    return f'<path class="import" d="{" ".join(steps)}" marker-end="url(#arrow)"/>'


def draw() -> str:
    """Return the picture."""
    trees = modules()
    found, arrows = rooms(trees), reduced(imports(trees))
    boxes, height = placed(found)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}">',
        f"<title>The rooms of {PACKAGE} and what they import</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 Z" fill="#0969da"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{height:.0f}"/>',
        *paths(arrows, boxes),
    ]
    for name, box in boxes.items():
        x, y = box.left + PADDING, box.top + PADDING + 12
        out.append(
            f'<rect x="{box.left:.0f}" y="{box.top:.0f}" width="{BOX}" height="{box.height:.0f}" rx="6"/>'
            f'<text class="name" x="{x:.0f}" y="{y:.0f}">{escape(name)}</text>'
            f'<text class="count" x="{box.left + BOX - PADDING:.0f}" y="{y:.0f}" text-anchor="end">{found[name].title}</text>'
        )
        out += [
            f'<text x="{x:.0f}" y="{y + LINE * i:.0f}">{escape(line)}</text>'
            for i, line in enumerate(found[name].lines, 1)
        ]
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw())
