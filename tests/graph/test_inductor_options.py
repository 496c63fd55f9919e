"""Options of Inductor: checked when they are given, and what compiles the transformed graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cpcompile import Config, ConfigError, _torch
from cpcompile.compile.inner import compile_inner
from tests.graph.small_models import TinyLM, batch, planned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "max-autotun"}, "is no mode of torch.compile: choose one of 'default'.*Did you mean 'max-autotune'"),
        ({"mode": "max-autotune", "inner": "eager"}, "use inner='inductor'"),
        ({"inner_options": {"shape_padding": True}, "inner": "aot_eager"}, "use inner='inductor'"),
        ({"inner_options": {"shape_paddin": True}}, "does not know. Did you mean 'shape_padding'"),
        ({"inner_options": {"shape_padding": 3}}, "of another type"),
        ({"inner_options": {1: 3}}, "a mapping, each time a string to any value"),
        ({"inner_options": "shape_padding"}, "a mapping"),
    ],
)
def test_wrong_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Config(**options)


def test_options_go_before_those_of_the_mode() -> None:
    config = Config(mode="max-autotune", inner_options={"triton.cudagraphs": False})
    assert config.inductor_options == _torch.options_of_mode("max-autotune") | {"triton.cudagraphs": False}
    assert Config().inductor_options == {}


def test_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def compile_fx(gm: Any, inputs: Any) -> Any:
        given.append(torch._inductor.config.max_autotune)
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    transformed = planned(TinyLM(), batch(), loss_chunk=0)
    inputs = [torch.empty(0)]
    compile_inner(transformed, inputs, Config(inner_options={"max_autotune": True}, loss_chunk=0))
    assert given == [True]
    assert not torch._inductor.config.max_autotune
