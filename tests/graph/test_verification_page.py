"""The outputs in docs/verification.md are what users get. `python -m tests.graph.test_verification_page` writes them there."""

from __future__ import annotations

import linecache
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "verification.md"
SETUP = re.compile(r"<!-- setup -->\n```python\n(.*?)```", re.DOTALL)
CASE = re.compile(
    r"^## (WRONG|[^\n]*)\n(?:(?!^## ).)*?```python\n(.*?)```\n\n```text\n(.*?)```", re.DOTALL | re.MULTILINE
)
ERROR = re.compile(r"\b(?:error|tolerance) [-+.e\d]+|worst \S+|\d\.\d{6,}")  # they depend on the last digits


def found(page: str, code: str) -> Any:
    """Return what `verify` finds in a snippet of the page."""
    # Dynamo looks for a module, once for each name, when it reads what the functions of a model use.
    module = ModuleType(f"model_of_page_{zlib.crc32(code.encode())}")
    sys.modules[module.__name__] = module
    linecache.cache["model.py"] = (len(code), None, code.splitlines(keepends=True), "model.py")
    torch._dynamo.reset()
    exec(SETUP.findall(page)[0], vars(module))
    exec(compile(code, "model.py", "exec"), vars(module))
    return vars(module)["found"]


def output(page: str, code: str) -> str:
    return "\n".join(line.rstrip() for line in str(found(page, code)).splitlines()) + "\n"


@pytest.mark.parametrize(("title", "code", "text"), CASE.findall(PAGE.read_text()))
def test_output_is_that_of_the_page(title: str, code: str, text: str) -> None:
    assert text.lower().startswith(title.lower())
    assert ERROR.sub("", output(PAGE.read_text(), code)) == ERROR.sub("", text), (
        "python -m tests.graph.test_verification_page writes the page anew"
    )


def test_page_has_every_verdict() -> None:
    assert [title for title, _, _ in CASE.findall(PAGE.read_text())] == ["Exact", "WRONG", "Nothing can be compared"]


def written(page: str) -> str:
    """Return the page with every output as it is now."""
    for _, code, text in CASE.findall(page):
        page = page.replace(f"{code}```\n\n```text\n{text}```", f"{code}```\n\n```text\n{output(page, code)}```")
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
