"""Wrappers around a context-parallel model: it is found inside them, and `apply` on a wrapper says what to call instead."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import cpcompile
from cpcompile.errors import ConfigError
from cpcompile.front.apply import whole_outputs
from tests.models import batch, error, logits_of, make

EXACT = 1e-12


class Holder(nn.Module):
    """A module that calls the models that it holds, as a LightningModule does."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, **inputs: Any) -> Any:
        return self.models[0](**inputs)


def cast(model: nn.Module) -> nn.Module:
    """Wrap the forward as accelerate does for mixed precision."""
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    model.forward = forward  # type: ignore[method-assign]
    return model


def bound(model: nn.Module) -> nn.Module:
    """Bind the forward as accelerate.unwrap_model does."""
    model.forward = types.MethodType(model.__dict__["forward"], model)  # type: ignore[method-assign]
    return model


WRAPPERS: dict[str, Any] = {
    "DDP": lambda model, rank: DistributedDataParallel(model, process_group=rank.process_group),
    "holder": lambda model, rank: Holder(model),
    "compiled": lambda model, rank: torch.compile(model, backend="eager"),
    "cast": lambda model, rank: cast(model),
    "bound": lambda model, rank: bound(model),
}


def joined(rank: Any, name: str) -> float:
    """Error of the logits that are joined, given the wrapper, and of those that come whole."""
    torch._dynamo.reset()
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    inputs = batch(alone, 13)
    cpcompile.apply(model, rank.mesh(), inner="eager", grad_sync="mean")
    wrapped = WRAPPERS[name](model, rank)
    local = logits_of(wrapped(**inputs))
    expected = logits_of(alone(**inputs))
    assert local.shape[1] == 7, "this rank's tokens"
    with whole_outputs(wrapped):
        whole = logits_of(wrapped(**inputs))
    again = logits_of(wrapped(**inputs))
    assert torch.equal(again, local)
    return max(
        error(cpcompile.unshard(local, wrapped).detach(), expected.detach()), error(whole.detach(), expected.detach())
    )


@pytest.mark.parametrize("name", WRAPPERS)
def test_is_found_in_a_wrapper(pool: Any, name: str) -> None:
    assert max(pool.run(2, joined, name)) < EXACT


def refused(rank: Any) -> list[str]:
    """The texts of what cannot be told or undone."""
    first, second = (cpcompile.apply(make("rotary"), rank.mesh(), inner="eager") for _ in range(2))
    texts = []
    for call in (
        lambda: cpcompile.unshard(torch.zeros(1, 2), Holder(first, second)),
        lambda: cpcompile.unshard(torch.zeros(1, 2), Holder(make("rotary"))),
        lambda: cpcompile.apply(Holder(first), rank.mesh()),
        lambda: cpcompile.remove(cast(second)),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        texts.append(str(caught.value))
    return texts


def test_what_cannot_be_told_is_refused(pool: Any) -> None:
    several, none, twice, replaced = pool.run(2, refused)[0]
    assert "holds 2 context-parallel models" in several and "models.0, models.1" in several
    assert "not context parallel: call cpcompile.apply" in none
    assert "context parallel already" in twice
    assert "keep_fp32_wrapper=False" in replaced


def class_of(name: str, module: str) -> type[nn.Module]:
    return type(name, (nn.Linear,), {"__module__": module})


@pytest.mark.parametrize(
    ("name", "module", "remedy"),
    [
        ("DistributedDataParallel", "torch.nn.parallel.distributed", "model.module"),
        ("DataParallel", "torch.nn.parallel.data_parallel", "torchrun"),
        ("FullyShardedDataParallel", "torch.distributed.fsdp", "fully_shard"),
        ("PeftModel", "peft.peft_model", "get_base_model"),
        ("LightningModule", "lightning.pytorch", "integrations.lightning"),
        ("DeepSpeedEngine", "deepspeed.runtime", "fully_shard"),
    ],
)
def test_wrappers_are_refused_with_what_to_call(name: str, module: str, remedy: str) -> None:
    own = type("Own", (class_of(name, module),), {})
    with pytest.raises(ConfigError, match=f"{name} is a wrapper.*{remedy}"):
        cpcompile.apply(own(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="mesh must be a DeviceMesh"):
        cpcompile.apply(class_of(name, "elsewhere")(2, 2), None)  # type: ignore[arg-type]


def parts(rank: Any) -> list[tuple[int, int]]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    cube = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("cp", "dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    for mesh, axis, text in (
        (grid["cp"], "cp", "2 of 4 ranks"),
        (grid, None, "2 axes"),
        (cube, ("cp", "no"), "no axis 'no'"),
    ):
        with pytest.raises(ConfigError, match=text):
            cpcompile.rank_and_replicas(mesh, axis)
    ways = ((grid, "cp"), (grid, "dp"), (cube, "cp"), (cube, ("cp", "tp")), (line, None))
    return [cpcompile.rank_and_replicas(mesh, axis) for mesh, axis in ways]


def dealt(rank: Any) -> tuple[list[list[int]], list[list[int]]]:
    """The batches of an epoch of torchdata's loader, and those of one that goes on where another stopped."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    part, num_replicas = cpcompile.rank_and_replicas(grid, "cp")

    def loader() -> Any:
        sampler = DistributedSampler(range(12), num_replicas=num_replicas, rank=part, seed=1)  # type: ignore[arg-type]
        return StatefulDataLoader(range(12), batch_size=2, sampler=sampler)  # type: ignore[arg-type]

    stopped, resumed = loader(), loader()
    batches = iter(stopped)
    first = next(batches).tolist()
    resumed.load_state_dict(stopped.state_dict())
    return [batch.tolist() for batch in loader()], [first, *(batch.tolist() for batch in resumed)]


def test_a_stateful_loader_deals_groups_their_batches(pool: Any) -> None:
    (first, resumed), same, (others, _), _ = found = pool.run(4, dealt)
    assert first == resumed and found[0] == same and found[2] == found[3]
    assert sorted(x for batches in (first, others) for batch in batches for x in batch) == list(range(12))


def test_rank_and_replicas(pool: Any) -> None:
    found = list(zip(*pool.run(4, parts), strict=True))
    assert found == [
        ((0, 2), (0, 2), (1, 2), (1, 2)),
        ((0, 2), (1, 2), (0, 2), (1, 2)),
        ((0, 2), (1, 2), (0, 2), (1, 2)),
        ((0, 1),) * 4,
        ((0, 1),) * 4,
    ]
