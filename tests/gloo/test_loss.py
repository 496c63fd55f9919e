"""`cpcompile.cross_entropy` on gloo ranks against torch's on one device: the loss on every rank and every gradient."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cpcompile
from cpcompile.errors import ConfigError, RanksDiffer
from tests.models import batch, error, errors, gradients, make

EXACT = 1e-12  # float64
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "sum": {"reduction": "sum"},
    "own label": {"shift": False},
    "smoothed": {"label_smoothing": 0.1},
    "number": {"num_items_in_batch": 40},
    "number as tensor": {"num_items_in_batch": torch.tensor(40)},
    "another index": {"ignore_index": 5},
}


def reference(logits: torch.Tensor, labels: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
    """Return the loss of one device, as people write it."""
    if way.get("shift", True):
        logits, labels = logits[:, :-1], labels[:, 1:]
    ignored = way.get("ignore_index", -100)
    number = way.get("num_items_in_batch")
    loss = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=ignored,
        reduction="sum" if number is not None else way.get("reduction", "mean"),
        label_smoothing=way.get("label_smoothing", 0.0),
    )
    return loss if number is None else loss / number


def new(rank: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    return cpcompile.apply(model, rank.mesh(), **{"inner": "eager"} | options), alone


def labelled(alone: nn.Module, length: int, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = batch(alone, length)
    labels = inputs["labels"].where(inputs["labels"] >= 0, 5) if way == "another index" else inputs["labels"]
    return inputs["input_ids"], labels


def errors_of_losses(rank: Any, options: dict[str, Any], lengths: list[int], ways: list[str]) -> dict[str, float]:
    model, alone = new(rank, **options)
    found = {}
    for length in lengths:
        for way in ways:
            ids, labels = labelled(alone, length, way)
            loss = cpcompile.cross_entropy(model(ids)["logits"], labels, model, **WAYS[way])
            expected = reference(alone(ids)["logits"], labels, WAYS[way])
            (2 * loss).backward()
            (2 * expected).backward()
            of_gradients = errors(gradients(model), gradients(alone))
            found |= {f"{name}, {way} at {length}": x for name, x in of_gradients.items()}
            found[f"{way} at {length}"] = error(loss.detach(), expected.detach())
    return found


def assert_exact(results: list[dict[str, float]]) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < EXACT, f"rank {rank}: {name} is off by {found[name]:.1e}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
def test_the_loss_is_that_of_one_device(pool: Any, layout: str, world_size: int) -> None:
    # 25 on 3 ranks: all slots of a chunk are padding
    assert_exact(
        pool.run(world_size, errors_of_losses, {"balancer": layout}, [25, 32], ["as it is", "sum"], timeout=120)
    )


@pytest.mark.parametrize("outputs", ["local", "full"])
def test_all_ways(pool: Any, outputs: str) -> None:
    options = {"balancer": "zig_zag", "outputs": outputs}
    assert_exact(pool.run(3, errors_of_losses, options, [31], list(WAYS), timeout=120))


def packed(rank: Any, layout: str) -> dict[str, float]:
    """Errors for packed documents, with a layout that follows them, and other documents in the next batch."""
    model, alone = new(rank, balancer=layout, documents="ids:documents")
    found = {}
    for cut in (9, 20):
        ids, labels = labelled(alone, 31, "as it is")
        documents = (torch.arange(31) >= cut).long().expand(2, -1)
        loss = cpcompile.cross_entropy(model(ids, documents=documents)["logits"], labels, model)
        parts = [alone(ids[:, :cut])["logits"], alone(ids[:, cut:])["logits"]]
        expected = reference(torch.cat(parts, dim=1), labels, {})
        loss.backward()
        expected.backward()
        found[f"loss {cut}"] = error(loss.detach(), expected.detach())
        found |= {f"{name} {cut}": x for name, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize("layout", ["zig_zag_by_document", "balanced"])
def test_packed_documents(pool: Any, layout: str) -> None:
    assert_exact(pool.run(3, packed, layout))


def averaged(rank: Any) -> dict[str, float]:
    """Errors where DDP averages over replicas and ranks, and the wrapper is what the loss is given."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    cpcompile.apply(model, mesh, axis="cp", inner="eager", grad_sync="mean")
    wrapped = DistributedDataParallel(model)
    ids, labels = labelled(alone, 31, "as it is")
    ids = ids.roll(mesh.get_local_rank("dp"), 1)
    loss = cpcompile.cross_entropy(wrapped(ids)["logits"], labels, wrapped)
    loss.backward()
    for shift in range(2):
        (reference(alone(labelled(alone, 31, "")[0].roll(shift, 1))["logits"], labels, {}) / 2).backward()
    return errors(gradients(model), gradients(alone))


def test_gradients_that_a_wrapper_averages(pool: Any) -> None:
    assert_exact(pool.run(4, averaged))


def without_ranks(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    model = make("rotary", num_layers=1, dtype=dtype)
    ids, labels = labelled(model, 31, "as it is")
    logits = model(ids)["logits"]
    widened = logits.float() if dtype != torch.float64 else logits
    return cpcompile.cross_entropy(logits, labels, model), reference(widened, labels, {})


def refused(kind: type[Exception], text: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind) as caught:
        cpcompile.cross_entropy(*args, **kwargs)
    assert text in str(caught.value), str(caught.value)


def wrong(rank: Any) -> None:
    model, alone = new(rank)
    ids, labels = labelled(alone, 31, "as it is")
    logits = model(ids)["logits"]
    refused(RanksDiffer, "must be given the same whole batch", logits, cpcompile.shard(labels, model), model)
    refused(ConfigError, "pass the labels of the whole sequence", logits, labels[:, :16], model)
    refused(ConfigError, "pass the labels of the whole sequence", logits, torch.cat([labels, labels], 1), model)
    refused(ConfigError, "but a rank's part of 31 tokens has 16", logits[:, 1:], labels, model)
    refused(ConfigError, "need integer labels of one dim less", logits, labels[:1], model)
    refused(ConfigError, "need integer labels of one dim less", logits, labels.double(), model)
    refused(ConfigError, "but this model is not context parallel", logits, labels, alone)
    refused(ConfigError, "reduction='none'", logits, labels, model, reduction="none")
    refused(ConfigError, "choose 'mean'", logits, labels, model, reduction="sum", num_items_in_batch=3)
    other = labels.clone()
    other[1, 7] += rank.rank
    refused(RanksDiffer, "the input 'labels' differs between rank 0 and rank(s) 1", logits, other, model)
    number = 10 + rank.rank
    refused(RanksDiffer, "the input 'num_items_in_batch' differs", logits, labels, model, num_items_in_batch=number)
    few = model(ids[:, :2])["logits"]
    assert few.shape[1] < 2, "local"
    cpcompile.cross_entropy(few, labels[:, :2], model).backward()


def test_what_does_not_fit(pool: Any) -> None:
    pool.run(2, wrong)


def logged(rank: Any) -> str:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("cpcompile.front.backend")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    model, alone = new(rank, balancer="zig_zag")
    model(**batch(alone, 31))
    log.removeHandler(handler)
    return "\n".join(lines)


def test_the_log_says_what_is_returned(pool: Any) -> None:
    for text in pool.run(2, logged):
        assert text.startswith("2 ranks, layout zig_zag; the model returns ")
        assert "[] whole" in text and "[2, 31, 61] local tokens of this rank along dim 1" in text
        assert "cpcompile.unshard" in text and "cpcompile.cross_entropy" in text
