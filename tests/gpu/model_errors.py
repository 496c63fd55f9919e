"""The errors of a context-parallel model against the untouched one in float64, beside those that one device makes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import cpcompile
from tests.gpu.jobs import Result
from tests.models import error, errors, gradients, loss_of

Batch = dict[str, torch.Tensor]


def model_errors(
    build: Callable[[], torch.nn.Module], dtype: str, batches: Mapping[str, Batch], mesh: DeviceMesh, **options: Any
) -> Result:
    """Return the worst error of the context-parallel model and of one device for each batch, and how many graphs it needed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(build().to(mesh.device_type, getattr(torch, dtype)))
    model, alone, exact = models[0], models[1], models[2].double()
    cpcompile.apply(model, mesh, **options)
    found: dict[str, Any] = {"eps": torch.finfo(getattr(torch, dtype)).eps, "batches": {}}
    for name, batch in batches.items():
        inputs = {key: x.to(mesh.device_type) for key, x in batch.items()}
        truth = _step(exact, inputs)
        ours, theirs = _errors(_step(model, inputs), truth), _errors(_step(alone, inputs), truth)
        worst = max(ours, key=ours.__getitem__)
        found["batches"][name] = {"worst": worst, "error": ours[worst], "alone": max(theirs.values())}
    return found | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def check(result: Result) -> None:
    """Compare the errors of one rank."""
    for name, found in result["batches"].items():
        # Each rank rounds its part of a gradient to the dtype, then the sum: a few units in the last place more than one
        # device, which rounds as often in its products. A part left out or counted twice is off by a tenth and more.
        limit = 2 * found["alone"] + 4 * result["eps"]
        assert found["error"] < limit, f"{found['worst']} of {name}, one device: {found['alone']:.1e}"


def _step(model: torch.nn.Module, inputs: Batch) -> Batch:
    """Return the loss and every gradient, in float64."""
    loss = loss_of(model(**inputs))
    loss.backward()
    return {name: x.double() for name, x in {"loss": loss.detach(), **gradients(model)}.items()}


def _errors(found: Batch, truth: Batch) -> dict[str, float]:
    """Return the error of the loss and of every gradient."""
    found, truth = dict(found), dict(truth)
    return {"loss": error(found.pop("loss"), truth.pop("loss")), **errors(found, truth)}
