"""docs/architecture.md: its picture is drawn from the code as it is, and what it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = re.findall(r"`((?:cpcompile|passes|tests|docs)/[^`\s:]+)(?::([\w.]+))?`", PAGE)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import draw_architecture

    return draw_architecture


def test_picture_is_that_of_the_code(drawing: ModuleType) -> None:
    assert drawing.PICTURE.read_text() == drawing.draw(), "the picture is stale: make reference"


def test_every_room_has_a_place_and_a_sentence(drawing: ModuleType) -> None:
    found = drawing.rooms(drawing.modules())
    assert sorted(name for layer in drawing.layers() for name in layer) == sorted(found)
    assert all(len(room.sentence) > 20 for room in found.values())


def test_every_room_says_what_comes_in_what_goes_out_and_what_it_imports(drawing: ModuleType) -> None:
    trees = drawing.modules()
    layer_of = {name: number for number, layer in enumerate(drawing.layers()) for name in layer}
    arrows = drawing.imports(trees)
    for name in drawing.rooms(trees):
        if not any(module.startswith(f"cpcompile.{name}.") for module in trees):
            continue  # a single module
        text = " ".join((ast.get_docstring(trees[f"cpcompile.{name}"]) or "").split())
        assert "In: " in text and " Out: " in text, name
        said = re.search(r"May import (?:`(\w+)`|nothing of cpcompile)", text)
        assert said, name
        highest = min((layer_of[to] for room, to in arrows if room == name), default=None)
        assert (layer_of[said[1]] if said[1] else None) == highest, f"{name} says {said[0]}"


def test_arrows_are_imports_and_the_others_follow(drawing: ModuleType) -> None:
    arrows = {("a", "b"), ("b", "c"), ("a", "c"), ("c", "d"), ("a", "d"), ("x", "d")}
    assert drawing.reduced(arrows) == [("a", "b"), ("b", "c"), ("c", "d"), ("x", "d")]
    trees = {
        "cpcompile": ast.parse("from cpcompile.front.apply import apply"),
        "cpcompile.front": ast.parse(""),
        "cpcompile.front.apply": ast.parse("from cpcompile import errors\nimport cpcompile.ir"),
        "cpcompile.errors": ast.parse(""),
        "cpcompile.ir": ast.parse("def f():\n    from cpcompile.errors import CPError"),
        "cpcompile.train": ast.parse("import cpcompile\ncpcompile.apply()\nimport torch"),
    }
    expected = {("front", "errors"), ("front", "ir"), ("ir", "errors"), ("train", "front")}
    assert drawing.imports(trees) == expected


def test_an_import_that_points_up_is_an_error(drawing: ModuleType) -> None:
    boxes, _ = drawing.placed(drawing.rooms(drawing.modules()))
    with pytest.raises(ValueError, match="errors imports front"):
        list(drawing.paths([("errors", "front")], boxes))


def names_in(tree: ast.AST) -> set[str]:
    """Return the names that a module or a class gives, those of a class with its name in front."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.FunctionDef(name=name):
                found.add(name)
            case ast.ClassDef(name=name):
                found |= {name, *(f"{name}.{inner}" for inner in names_in(node))}
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
    return found


@pytest.mark.parametrize(("path", "name"), sorted(set(NAMED)), ids=lambda part: part or "-")
def test_what_is_named_exists(path: str, name: str) -> None:
    assert (ROOT / path).exists()
    if name:
        assert name in names_in(ast.parse((ROOT / path).read_text()))


def test_many_are_named() -> None:
    assert len(NAMED) > 60
