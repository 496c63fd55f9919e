"""Training frameworks in the ranks of the pool: as torchrun would start them, or as one process that knows of no ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def started(environment: dict[str, str]) -> Iterator[None]:
    """Surround code in which frameworks are to find these variables, and nothing of what they found before."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (AcceleratorState, PartialState, GradientState)
    for state in states:
        state._shared_state.clear()
    torch._dynamo.reset()
    others = {name: x for name, x in os.environ.items() if name not in NAMES}
    with mock.patch.dict(os.environ, others | environment, clear=True):
        torch.manual_seed(0)
        yield
    for state in states:
        state._shared_state.clear()


def on_ranks() -> contextlib.AbstractContextManager[None]:
    """Surround what runs on all ranks."""
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    values = (rank, rank, world_size, world_size, "tests", "localhost", "29500")
    return started(dict(zip(NAMES, values, strict=True)))


def on_one_device(run: Callable[[], Any]) -> Any:
    """Return what a function returns that knows of no ranks; the first one calls it for all."""
    found = [None]
    if dist.get_rank() == 0:
        with started({}):
            found = [run()]
    dist.broadcast_object_list(found)
    return found[0]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the trained weights by name."""
    return {name: whole(x.detach()).clone() for name, x in model.named_parameters()}


def whole(x: Any) -> torch.Tensor:
    """Return a tensor of which each rank may hold a shard."""
    found: torch.Tensor = x.full_tensor() if isinstance(x, DTensor) else x
    return found


def far(found: Any, expected: Any) -> dict[str, float]:
    """Return how far numbers and tensors of the same names are from those expected, as a part of the largest or of 1."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    pairs = {name: (torch.as_tensor(found[name]), torch.as_tensor(x)) for name, x in expected.items()}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape, (name, a.shape, b.shape)
    return {
        name: float((a.double() - b.double()).abs().max() / max(1.0, b.double().abs().max()))
        for name, (a, b) in pairs.items()
    }
