"""Losses in chunks of tokens on gloo ranks, and logits that are made when they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import cpcompile
from cpcompile.front.deferred_tensor import DeferredTensor
from cpcompile.runtime.tiles.loss_body import _BODIES
from tests.models import batch, error, errors, make

EXACT = 1e-12  # float64
FLOAT32 = 2e-5  # transformers models cast to float32 themselves: rounding, times the depth
LENGTH = 29  # no number of ranks divides it


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def new(rank: Any, is_sharded: bool = False, **options: Any) -> Any:
    torch._dynamo.reset()
    model, alone = make("llama", num_layers=1), make("llama", num_layers=1)
    if is_sharded:
        for layer in model.model.layers:
            fully_shard(layer, mesh=rank.mesh())
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), **{"inner": "aot_eager", "loss_chunk": 4} | options)
    return model, alone


def trained(rank: Any, inner: str, is_sharded: bool) -> dict[str, float]:
    """Errors of two backward passes, of sequences of two lengths."""
    _BODIES.clear()
    model, alone = new(rank, is_sharded, inner=inner)
    found: dict[str, float] = {}
    for length in (LENGTH, LENGTH + 6):
        ours, theirs = model(**batch(alone, length)), alone(**batch(alone, length))
        assert isinstance(ours.logits, DeferredTensor)
        for each in (ours, theirs):
            each.loss.backward()
        found[f"loss {length}"] = error(ours.loss.detach(), theirs.loss.detach())
    (body,) = _BODIES.values()
    assert bool(body._compiled) == (inner == "inductor")
    return found | errors(gradients(model), gradients(alone))


@pytest.mark.parametrize(
    ("world_size", "inner", "is_sharded"),
    [
        (1, "aot_eager", False),
        pytest.param(2, "inductor", True, marks=pytest.mark.slow),
        (3, "eager", False),
        pytest.param(4, "inductor", False, marks=pytest.mark.slow),
    ],
)
def test_trains_exactly(pool: Any, world_size: int, inner: str, is_sharded: bool) -> None:
    for found in pool.run(world_size, trained, inner, is_sharded, timeout=250):
        assert max(found.values()) < FLOAT32, found


def read(rank: Any, is_sharded: bool) -> dict[str, float]:
    """Errors where logits are read: without gradients, with them in a second loss, and behind `no_sync`."""
    model, alone = new(rank, is_sharded)
    found: dict[str, float] = {}
    for index in range(2):
        ours, theirs = model(**batch(alone, LENGTH)), alone(**batch(alone, LENGTH))
        logits = ours.logits
        assert (
            logits.requires_grad and logits.shape[-1] == theirs.logits.shape[-1] and logits.dtype == theirs.logits.dtype
        )
        halves = logits.float().detach()
        assert isinstance(halves, DeferredTensor) and not halves.requires_grad
        with torch.no_grad():
            whole = cpcompile.unshard(logits, model)
            found[f"logits {index}"] = error(whole, theirs.logits.detach())
            found[f"cast {index}"] = error(cpcompile.unshard(halves, model), theirs.logits.detach().float())
        again = cpcompile.cross_entropy(logits, batch(alone, LENGTH)["labels"], model, label_smoothing=0.3)
        expected = cpcompile.cross_entropy(theirs.logits, batch(alone, LENGTH)["labels"], alone, label_smoothing=0.3)
        found[f"second loss {index}"] = error(again.detach(), expected.detach())
        with cpcompile.no_sync(model) if index == 0 else torch.enable_grad():
            (ours.loss + 0.5 * again).backward()
        (theirs.loss + 0.5 * expected).backward()
    return found | errors(gradients(model), gradients(alone))


@pytest.mark.parametrize(
    "is_sharded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "fully_shard"]
)
def test_logits_that_are_read(pool: Any, is_sharded: bool) -> None:
    for found in pool.run(2, read, is_sharded):
        assert max(found.values()) < FLOAT32, found


def read_by_one(rank: Any) -> dict[str, float]:
    """Errors where FSDP shards the head and one rank alone reads logits, without gradients."""
    model, alone = new(rank, is_sharded=True, inner="aot_eager")
    ours, theirs = model(**batch(alone, LENGTH)), alone(**batch(alone, LENGTH))
    found = {}
    if rank.rank == 1:
        wanted = cpcompile.shard(theirs.logits.detach(), model, padding=float("nan"))
        is_token = ~wanted.isnan()
        found["logits"] = error(ours.logits.detach()[is_token], wanted[is_token])
    ours.loss.backward()
    theirs.loss.backward()
    return found | errors(gradients(model), gradients(alone))


def test_one_rank_may_read_logits_of_a_sharded_head(pool: Any) -> None:
    for found in pool.run(2, read_by_one):
        assert max(found.values()) < FLOAT32, found


def packed(rank: Any) -> dict[str, float]:
    """Errors where FSDP shards the head and the layout follows documents, whose bounds leave the graph as well."""
    model, alone = new(rank, is_sharded=True, balancer="zig_zag_by_document")
    given = batch(alone, LENGTH)
    places = torch.cat([torch.arange(11), torch.arange(LENGTH - 11)]).expand_as(given["input_ids"])
    ours, theirs = (m(**given, position_ids=places) for m in (model, alone))
    with torch.no_grad():
        found = {"logits": error(cpcompile.unshard(ours.logits, model), theirs.logits.detach())}
    ours.loss.backward()
    theirs.loss.backward()
    return found | errors(gradients(model), gradients(alone))


def test_a_sharded_head_of_packed_documents(pool: Any) -> None:
    for found in pool.run(2, packed):
        assert max(found.values()) < FLOAT32, found


def evaluated(rank: Any, is_sharded: bool) -> tuple[float, bool]:
    model, alone = new(rank, is_sharded, inner="eager")
    with torch.no_grad():
        ours, theirs = model(**batch(alone, LENGTH)), alone(**batch(alone, LENGTH))
        return error(cpcompile.unshard(ours.logits, model), theirs.logits), isinstance(ours.logits, DeferredTensor)


def test_evaluation_returns_logits(pool: Any) -> None:
    for worst, is_deferred in pool.run(2, evaluated, True):
        assert worst < FLOAT32 and not is_deferred
