"""Errors say where to read more, once, and what they name exists."""

from __future__ import annotations

import pickle
import re
import traceback
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import cpcompile
from cpcompile import errors
from cpcompile.cli import app
from cpcompile.errors import ConfigError, CPError, NoRule
from cpcompile.passes import PIPELINE
from cpcompile.rules.registry import REFUSED_PAGE
from cpcompile.train.failures import RankError  # noqa: F401  (a class of another module)

ROOT = Path(__file__).parents[2]


def anchors(page: str) -> set[str]:
    """Return the anchors of the headings of a page, as the site and GitHub make them."""
    found = re.findall(r"(?m)^#+ (.*)$", (ROOT / errors.DOCS / page).read_text())
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in found}


def is_there(note: str) -> bool:
    page, _, anchor = note.removeprefix(f"Read more: {errors.DOCS}/").partition("#")
    return anchor in anchors(page)


def all_errors(base: type[CPError] = CPError) -> list[type[CPError]]:
    own = [each for each in base.__subclasses__() if each.__module__.startswith("cpcompile.")]
    return [base, *(x for each in own for x in all_errors(each))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_each_class_has_a_place(kind: type[CPError]) -> None:
    error = kind("what")
    assert str(error) == "what"
    (note,) = error.__notes__
    assert is_there(note), note


def test_a_note_is_shown_once() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("what")))
    assert "".join(traceback.format_exception(error)).count("Read more: docs/diagnostics.md#configerror\n") == 1
    result = CliRunner().invoke(app, ["train", "--no-apply", "--ranks", "2"])
    assert result.stderr.splitlines()[1:] == ["Read more: docs/diagnostics.md#configerror"]


class Sorting(nn.Module):
    """Sorts its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids).mean(-1)[:1].sort(dim=1).values


def test_a_refused_operator_leads_to_its_rule_and_its_pass() -> None:
    with pytest.raises(NoRule) as caught:
        cpcompile.explain(Sorting(), {"input_ids": torch.zeros(2, 8, dtype=torch.int64)}, world_size=2)
    assert caught.value.__notes__ == [f"Read more: docs/{REFUSED_PAGE}", "Read more: docs/passes.md#place_tokens"]
    assert all(map(is_there, caught.value.__notes__))


def test_each_pass_has_a_place() -> None:
    names = {function.__name__ for function in PIPELINE}
    assert names <= anchors("passes.md"), names - anchors("passes.md")
