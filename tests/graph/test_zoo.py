"""The zoo: entries build, results are classified, and a wrong transform is called wrong."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from cpcompile.zoo.catalogue import ENTRIES, find_entries


def test_the_zoo_has_every_entry() -> None:
    assert len(ENTRIES) == 220
    assert len(find_entries(["causal"])) == 137
    with pytest.raises(KeyError, match="no such entry"):
        find_entries(["nothing"])
