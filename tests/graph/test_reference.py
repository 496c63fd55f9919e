"""docs/passes.md, docs/rules.md and docs/api.md say what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cpcompile.passes import PIPELINE
from cpcompile.rules import RULES
from cpcompile.rules.refusals import REFUSED

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import write_reference

    return write_reference


@pytest.mark.parametrize("name", ["passes.md", "rules.md", "api.md"])
def test_page_is_that_of_the_code(reference: ModuleType, name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == reference.PAGES[name](), f"docs/{name} is stale: make reference"


def test_every_pass_is_in_the_pipeline_and_in_the_order_of_the_page() -> None:
    names = [function.__name__ for function in PIPELINE]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "passes").glob("[a-z]*.py"))
    page = (ROOT / "docs" / "passes.md").read_text()
    places = [page.index(f"\n### {name}\n") for name in names]
    assert places == sorted(places)


def test_every_pass_is_in_the_way_of_a_model_in_order() -> None:
    way = (ROOT / "docs" / "how_it_works.md").read_text().partition("\n## ")[0]
    assert re.findall(r"^ {6}([a-z_]+) +", way, re.MULTILINE) == [function.__name__ for function in PIPELINE]


@pytest.mark.parametrize("function", PIPELINE, ids=lambda function: function.__name__)
def test_every_pass_says_what_it_needs_and_gives(reference: ModuleType, function: Any) -> None:
    parts = reference.sections(function.__doc__)
    assert parts[""].startswith("Return how many ")
    assert parts["Needs"].endswith(".")
    assert parts["Gives"].endswith((".", "..."))


def test_every_rule_is_on_the_page(reference: ModuleType) -> None:
    page = (ROOT / "docs" / "rules.md").read_text()
    own = [str(t).removesuffix(".default") for t, rule in RULES.items() if not reference.is_tagged(t, rule)]
    refused = [f"aten.{name}".removesuffix(".default") for names in REFUSED.values() for name in names]
    assert [name for name in (*own, *refused) if f"`{name}`" not in page] == []
    assert "<locals>" not in page


def test_sections_of_a_docstring(reference: ModuleType) -> None:
    text = """Return how many.

    Needs: this,
        and that.
    Gives: those.

    More of it.

    Raises:
        NoRule: one
            reason.
        ConfigError: another.
    """
    assert reference.sections(text) == {
        "": "Return how many.",
        "Needs": "this, and that.",
        "Gives": "those.",
        "Raises": "`NoRule`: one reason; `ConfigError`: another.",
        "also": "More of it.",
    }


def test_indices_are_set_as_code(reference: ModuleType) -> None:
    assert (
        reference.notation_of("[a b], [n] or [] -> [a], closed along b") == "`[a b], [n] or [] -> [a]`, closed along b"
    )
    assert reference.notation_of("as the equation says") == "as the equation says"
