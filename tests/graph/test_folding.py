"""Equal layers are one row, and nothing else is."""

import pytest

from cpcompile.ir.folding import fold, one_path, ranges


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0, 1], "0,1"),
        ([0, 1, 2], "0..2"),
        ([0, 2, 4, 6], "0,2,..,6"),
        ([0, 1, 2, 3, 5], "0..3,5"),
        ([1, 3, 4], "1,3,4"),
    ],
)
def test_ranges(values: list[int], text: str) -> None:
    assert ranges(values) == text


def test_layers_of_two_kinds_are_two_rows() -> None:
    rows = [(f"model.layers.{i}.attn", "window" if i % 2 else "causal") for i in range(8)]
    found = fold(rows, lambda row: row[0], lambda row: row[1])
    assert [name for name, _ in found] == ["model.layers.{0,2,..,6}.attn", "model.layers.{1,3,..,7}.attn"]
    assert [len(group) for _, group in found] == [4, 4]


def test_numbers_that_are_no_grid_stay_apart() -> None:
    assert one_path(["a.0.b.0", "a.1.b.1"]) == ""
    assert one_path(["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"]) == "a.{0,1}.b.{0,1}"
    assert fold(["a.0.b.0", "a.1.b.1"], str, lambda _: 0) == [("a.0.b.0", ["a.0.b.0"]), ("a.1.b.1", ["a.1.b.1"])]


def test_what_is_called_twice_is_one_row_of_two() -> None:
    assert fold(["shared.attn", "shared.attn"], str, lambda _: 0) == [("shared.attn", ["shared.attn"] * 2)]
