"""Ranks that were started with different options are told which."""

import dataclasses
from pathlib import Path

import pytest

from cpcompile.errors import ConfigError
from cpcompile.train import TrainOptions
from cpcompile.train.join import check_same_options


def test_other_options_on_a_rank() -> None:
    options = TrainOptions(steps=10)
    other = dataclasses.replace(options, steps=20, batch_size=2)
    with pytest.raises(
        ConfigError,
        match=r"(?m)different options: --steps 20 on rank 1 and 10 on rank 0; --batch-size 2 on rank 1 and 1 on rank 0\.$",
    ):
        check_same_options([options, other])


def test_what_is_of_the_host_may_differ() -> None:
    options = TrainOptions(steps=10)
    check_same_options([options, dataclasses.replace(options, log=Path("log"), model=Path("/local/model"))])
