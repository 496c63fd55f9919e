"""Options of the wrong type, wrong names and values, and dims that an input does not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy
import pytest
import torch

from cpcompile import Config, ConfigError, InputError, explain
from cpcompile.options.checking import check_types, did_you_mean
from tests.models import make

WRONG: dict[type, list[Any]] = {
    bool: ["False", "True", 1, None],
    int: ["0", 1.5, True, None],
    float: ["0.5", True, None],
    str: [0, None, True, b"ring"],
}


@pytest.mark.parametrize("option", fields(Config), ids=lambda f: f.name)
def test_every_option_has_a_type(option: Any) -> None:
    """Generic: an option that is added is checked as well."""
    for value in WRONG.get(type(option.default), [None, "input_ids", 7]):
        with pytest.raises(ConfigError) as caught:
            Config(**{option.name: value})
        assert str(caught.value).startswith(f"{option.name}={value!r} is a"), str(caught.value)
        assert ", and this option is " in str(caught.value)


def test_messages() -> None:
    for options, text in (
        ({"strict": "False"}, "strict='False' is a str, and this option is True or False."),
        (
            {"token_dims": None},
            "token_dims=None is a NoneType, and this option is a mapping, each time a string to a whole number.",
        ),
        (
            {"dynamic": 1, "heads_per_message": "2"},
            "heads_per_message='2' is a str, and this option is a whole number.\n"
            "dynamic=1 is an int, and this option is True or False.",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            Config.of(options)
        assert str(caught.value) == text


def test_what_fits() -> None:
    Config(token_dims={"x": numpy.int64(1)}, token_local=("a", "b"), heads_per_message=2)
    Config(token_local=["a"], token_dims={})


@pytest.mark.parametrize(
    "options",
    [
        {"token_dims": {"x": "1"}},
        {"token_dims": {1: 1}},
        {"token_dims": [("x", 1)]},
        {"token_local": [torch.nn.Linear]},
    ],
)
def test_what_is_inside_is_checked_too(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="and this option is a"):
        Config(**options)


@dataclass
class Others:
    rate: float = 0.0
    size: int | None = None
    names: Sequence[str] = ()
    table: Mapping[str, Sequence[int]] = field(default_factory=dict)


def test_other_annotations() -> None:
    check_types(Others(1, None, ["a"], {"a": [1]}))
    for wrong in (Others(rate="1"), Others(size="1"), Others(names="ab"), Others(table={"a": ["b"]})):  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="and this option is"):
            check_types(wrong)


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"stratgy": "ring"}, "strategy"),
        ({"output": "full"}, "outputs"),
        ({"axes": "cp"}, "axis"),
        ({"strategy": "rings"}, "ring"),
        ({"strategy": "Ring"}, "ring"),
        ({"balancer": "zigzag"}, "zig_zag"),
        ({"inner": "inducter"}, "inductor"),
    ],
)
def test_did_you_mean(options: dict[str, Any], meant: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.of(options)
    assert str(caught.value).endswith(f" Did you mean {meant!r}?"), str(caught.value)


def test_nothing_near() -> None:
    assert did_you_mean("xyz", ["ring", "gather"]) == ""


def plan(**options: Any) -> Any:
    ids = torch.randint(60, (2, 8))
    return explain(make("rotary", num_layers=1), {"input_ids": ids}, world_size=2, **options)


@pytest.mark.parametrize("dim", [7, 2, -3])
def test_a_dim_that_the_input_does_not_have(dim: int) -> None:
    with pytest.raises(InputError) as caught:
        plan(token_dims={"input_ids": dim})
    assert str(caught.value) == (
        f"token_dims={{'input_ids': {dim}}}: the input 'input_ids' of shape [2, 8] has 2 dims: "
        "the dim of its tokens is one of 0, 1."
    )


def test_a_dim_counted_from_the_end() -> None:
    assert plan(token_dims={"input_ids": -1}).token_inputs == {"input_ids": 1}


def test_a_misspelt_input() -> None:
    with pytest.raises(InputError, match=r"the inputs of the model are: input_ids\. Did you mean 'input_ids'\?"):
        plan(token_dims={"inputs_ids": 1})
