"""`torch.compile` around a context-parallel model, or inside it: one program, compiled once, with exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import cpcompile
from cpcompile.compile import inner as inner_module
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64
OUTER: list[Any] = []  # the graphs that the compiler around the model was given


def outer(gm: Any, inputs: Any) -> Any:
    OUTER.append(gm)
    return gm.forward


def compiled_by_itself(model: nn.Module) -> nn.Module:
    model.compile(backend=outer)
    return model


def with_compiled_part(model: nn.Module) -> nn.Module:
    model.blocks[0].mlp.compile(backend=outer)
    return model


Way = Callable[[nn.Module, Callable[[nn.Module], nn.Module]], Any]
WAYS: dict[str, Way] = {
    "compile(apply)": lambda model, apply: torch.compile(apply(model), backend=outer),
    "compile(apply), whole": lambda model, apply: torch.compile(apply(model), backend=outer, fullgraph=True),
    "compile(apply), dynamic": lambda model, apply: torch.compile(apply(model), backend=outer, dynamic=True),
    "apply(compile)": lambda model, apply: apply(torch.compile(model, backend=outer)),
    "apply, then compile()": lambda model, apply: compiled_by_itself(apply(model)),
    "compile(), then apply": lambda model, apply: apply(compiled_by_itself(model)),
    "parts": lambda model, apply: apply(with_compiled_part(model)),
}


def run(rank: Any, way: str) -> tuple[dict[str, float], int, int]:
    """Errors of three steps, the number of transformations, and of graphs of the compiler around the model."""
    torch._dynamo.reset()
    OUTER.clear()
    calls: list[None] = []
    transform = inner_module.transform

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return transform(*args, **kwargs)

    inner_module.transform = counted
    try:
        model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
        called = WAYS[way](model, lambda model: cpcompile.apply(model, rank.mesh(), inner="eager"))
        found = {}
        for index, length in enumerate((31, 31, 20)):
            inputs = batch(alone, length, seed=index)
            output, expected = called(**inputs), alone(**inputs)
            whole = cpcompile.unshard(output["logits"], called)
            found[f"logits {index}"] = error(whole.detach(), expected["logits"].detach())
            loss_of(output).backward()
            loss_of(expected).backward()
            found |= {f"{n} {index}": x for n, x in errors(gradients(model), gradients(alone)).items()}
        cpcompile.remove(called)
        assert "forward" not in vars(model)
        return found, len(calls), len(OUTER)
    finally:
        inner_module.transform = transform


@pytest.mark.parametrize("way", WAYS)
def test_one_program(pool: Any, way: str) -> None:
    for found, num_transforms, num_outer in pool.run(2, run, way):
        assert max(found.values()) < EXACT, found
        assert (num_transforms, num_outer) == (1, 0)
