"""Which values of a weight ranks must have alike, and when they are due to be compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cpcompile.front.module_state import ModuleState
from cpcompile.front.weights import Watch, describe_weight, same_parts


def distributed(rank: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, local = rank.mesh(), torch.full((2, 3), float(rank.rank))
    shard, whole = (DTensor.from_local(local, mesh, [placement]) for placement in (Shard(0), Replicate()))
    assert same_parts(shard) == [], "other values on other ranks, as it should be"
    (part,) = same_parts(whole)
    assert type(part) is torch.Tensor and part.shape == local.shape
    assert "Shard(dim=0)" in describe_weight(shard) and "[4, 3]" in describe_weight(shard)
    watch = Watch()
    watch.look(lambda: ["a"], [nn.Parameter(shard)])


def test_shards_may_differ(pool: Any) -> None:
    pool.run(2, distributed)


def test_parts() -> None:
    assert same_parts(torch.empty(2, device="meta")) == []
    plain = nn.Parameter(torch.ones(2))
    assert same_parts(plain) == [plain]


def looked(model: nn.Module) -> tuple[Watch, ModuleState]:
    watch, state = Watch(), ModuleState(model)
    look(watch, state)
    assert watch.is_due
    watch.compared(state.weights())
    return watch, state


def look(watch: Watch, state: ModuleState) -> int:
    state.training()
    return watch.look(state.weight_names, state.weights())


def set_data(model: Any) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def add(model: Any) -> None:
    model[1].register_buffer("more", torch.ones(1))


def replace(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def replace_module(model: Any) -> None:
    model[0] = nn.Linear(3, 3)


def move(model: Any) -> None:
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].register_buffer("weight", weight.clone())


@pytest.mark.parametrize("change", [set_data, add, replace, replace_module, move, nn.Module.double])
def test_due_again(change: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    watch, state = looked(model)
    assert look(watch, state) == look(watch, state) and not watch.is_due
    change(model)
    look(watch, state)
    assert watch.is_due
    assert state.weight_names() == [*dict(model.named_parameters()), *dict(model.named_buffers())]


def test_writes_are_counted() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    watch, state = looked(model)
    before = look(watch, state)
    with torch.no_grad():
        model[0].bias.add_(1)
    assert look(watch, state) != before and not watch.is_due


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        watch, state = looked(nn.Linear(3, 3))
    assert look(watch, state) == look(watch, state)
