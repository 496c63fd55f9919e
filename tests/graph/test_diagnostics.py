"""The messages in docs/diagnostics.md are those that users get. `python -m tests.graph.test_diagnostics` writes them there."""

from __future__ import annotations

import linecache
import pkgutil
import re
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cpcompile import CPError, explain

PAGE = Path(__file__).parents[2] / "docs" / "diagnostics.md"
SETUP = re.compile(r"<!-- setup -->\n```python\n(.*?)```", re.DOTALL)
CASE = re.compile(r"^## (.*?)\n\n```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Case:
    """A model of the page and the message that it gets there."""

    title: str
    code: str
    message: str


def cases(page: str) -> list[Case]:
    return [Case(*found) for found in CASE.findall(page)]


def message(page: str, case: Case) -> str:
    """Return the message that the model of a case gets."""
    # Dynamo looks for a module, once for each name, when it reads what the functions of a model use.
    module = ModuleType(f"model_of_page_{zlib.crc32(case.code.encode())}")
    sys.modules[module.__name__] = module
    space = vars(module)
    exec(SETUP.findall(page)[0], space)
    linecache.cache["model.py"] = (len(case.code), None, case.code.splitlines(keepends=True), "model.py")
    exec(compile(case.code, "model.py", "exec"), space)
    torch._dynamo.reset()
    try:
        explain(space["model"], space["inputs"], world_size=2, **space.get("options", {}))
    except CPError as error:
        lines = f"{type(error).__name__}: {error}".splitlines()
        return "\n".join(line.rstrip() for line in lines) + "\n"
    raise AssertionError(f"{case.title}: this model is not refused any more: take it out of {PAGE.name}")


def written(page: str) -> str:
    """Return the page with every message as it is now."""
    for case in cases(page):
        page = page.replace(
            f"{case.code}```\n\n```text\n{case.message}```", f"{case.code}```\n\n```text\n{message(page, case)}```"
        )
    return page


@pytest.mark.parametrize("case", cases(PAGE.read_text()), ids=lambda case: case.title)
def test_message_is_that_of_the_page(case: Case) -> None:
    text = message(PAGE.read_text(), case)
    assert text == case.message, "python -m tests.graph.test_diagnostics writes the page anew"


@pytest.mark.parametrize("case", cases(PAGE.read_text()), ids=lambda case: case.title)
def test_message_says_what_where_and_what_to_do(case: Case) -> None:
    first, *others = case.message.strip().splitlines()
    assert re.match(r"(NoRule|GraphBreakError|InputError|ConfigError|CPError): ", first)
    if first.startswith(("NoRule", "GraphBreakError")):
        assert any("model.py:" in line for line in others)
    assert re.search(r"token_dims|Compute|Change|Write|Return|Remove|Kernels for this|declare it", case.message)


@pytest.mark.parametrize("case", cases(PAGE.read_text()), ids=lambda case: case.title)
def test_message_names_what_exists(case: Case) -> None:
    for name in re.findall(r"cpcompile(?:\.\w+)+", case.message):
        assert callable(pkgutil.resolve_name(name)), name


def test_page_has_ten_models() -> None:
    assert len(cases(PAGE.read_text())) >= 10


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
