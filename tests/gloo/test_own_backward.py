"""On gloo ranks, functions with a backward of their own give the gradients of one device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

import cpcompile
from tests.graph.small_models import batch
from tests.graph.test_own_backward import FUNCTIONS, Model
from tests.models import errors, gradients

EXACT = 1e-12  # float64
NAMES = [
    "weight",
    "norm of a weight's gradient",
    "clamp",
    "shifted",
    "table",
]  # DDP waits for the gradient of each parameter


def all_of_them(model: Model, x: torch.Tensor) -> torch.Tensor:
    for name in NAMES:
        x = x + FUNCTIONS[name](model, x) / len(NAMES)
    return x


def trained(rank: Any, options: dict[str, Any]) -> dict[str, float]:
    """Errors of the loss and of the gradients, at a length that no number of ranks divides."""
    torch._dynamo.reset()
    alone = Model(all_of_them)
    model = cpcompile.apply(copy.deepcopy(alone), rank.mesh(), balancer="zig_zag", **options)
    is_averaged = options.get("grad_sync") == "mean"
    called = DistributedDataParallel(model, process_group=rank.process_group) if is_averaged else model
    losses = [each(**batch(11)) for each in (called, alone)]
    for loss in losses:
        loss.backward()
    found, expected = ({"loss": loss.detach()} for loss in losses)
    return errors(found | gradients(model), expected | gradients(alone))


@pytest.mark.always
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (3, {"inner": "aot_eager"}),
        pytest.param(3, {"inner": "eager"}, marks=pytest.mark.slow),
        (2, {"inner": "eager", "grad_sync": "mean"}),
        pytest.param(2, {"inner": "inductor"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ranks_train_as_one_device(pool: Any, world_size: int, options: dict[str, Any]) -> None:
    for found in pool.run(world_size, trained, options, timeout=250):
        name = max(found, key=found.__getitem__)
        assert found[name] < EXACT, f"{name} is off by {found[name]:.1e}"
