"""Packed sequences on gloo ranks: exact under every compiler, with one graph for all lengths and one search for documents."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import cpcompile
from cpcompile.runtime import document_bounds
from tests.models import batch, error, errors, gradients, loss_of, make
from tests.packing import MIXES, PackedLM, packed_batch

EXACT, LENGTHS = 1e-6, (31, 64, 97)  # transformers' models cast to float32 themselves


SEARCHED: list[Tensor] = []


@functools.cache
def record_searches() -> None:
    """Let every search for documents in this process add its batch to `SEARCHED`. The profiler of torch 2.14 leaves some out."""

    @document_bounds.register_kernel("cpu")
    def _(documents: Tensor) -> Tensor:
        SEARCHED.append(documents)
        with document_bounds.set_kernel_enabled("cpu", enabled=False):
            return document_bounds(documents)


def packed(model: torch.nn.Module, length: int) -> dict[str, Any]:
    """Return a batch whose positions restart, at other places in each of its rows."""
    places = torch.arange(length)
    positions = torch.stack([places % 13, (places - 5) % 29])
    return batch(model, length) | {"position_ids": positions, "use_cache": False}


def trained(rank: Any, name: str, inner: str, strategy: str, layout: str) -> tuple[dict[str, float], int, list[int]]:
    """Return the errors at all lengths, how many graphs there are, and how often documents were searched in each step."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, alone = make(name), make(name)
    model.gradient_checkpointing_enable()
    model = cpcompile.apply(model, rank.mesh(), inner=inner, strategy=strategy, balancer=layout)
    found: dict[str, float] = {}
    searches = []
    record_searches()
    for length in LENGTHS:
        SEARCHED.clear()
        loss = loss_of(model(**packed(alone, length)))
        loss.backward()
        searches.append(len(SEARCHED))
        expected = loss_of(alone(**packed(alone, length)))
        expected.backward()
        found[f"loss at {length}"] = error(loss, expected)
        found |= {f"{key} at {length}": x for key, x in errors(gradients(model), gradients(alone)).items()}
    return found, torch._dynamo.utils.counters["stats"]["unique_graphs"], searches


@pytest.mark.always
@pytest.mark.parametrize(
    ("name", "inner", "strategy", "layout", "world_size"),
    [
        ("llama", "eager", "gather", "zig_zag", 3),
        ("llama", "aot_eager", "ring", "balanced", 2),
        pytest.param("llama", "inductor", "ring", "balanced", 2, marks=pytest.mark.slow),
        pytest.param("llama", "inductor", "ulysses", "zig_zag", 2, marks=pytest.mark.slow),
        pytest.param("gemma2", "inductor", "gather", "balanced", 2, marks=pytest.mark.slow),
    ],
)
def test_packed_sequences(pool: Any, name: str, inner: str, strategy: str, layout: str, world_size: int) -> None:
    for found, num_graphs, searches in pool.run(world_size, trained, name, inner, strategy, layout, timeout=300):
        assert max(found.values()) < EXACT, found
        assert num_graphs == 1, "one graph serves all lengths"
        assert searches == [1, 1, 1], "all layers share one search"


def trained_mixes(rank: Any, strategy: str, layout: str, batch_size: int) -> dict[str, float]:
    """Return the errors of loss, gradients and joined logits for every mix of documents."""
    torch._dynamo.reset()
    model, alone = packed_lm(), packed_lm()
    options: dict[str, Any] = {"inner": "eager", "strategy": strategy, "balancer": layout}
    if strategy == "usp":
        grid = init_device_mesh("cpu", (rank.world_size // 2, 2), mesh_dim_names=("ring", "heads"))
        cpcompile.apply(model, grid, axis=("ring", "heads"), **options)
    else:
        cpcompile.apply(model, rank.mesh(), **options)
    found: dict[str, float] = {}
    for mix in MIXES:
        inputs = packed_batch(mix, batch_size)
        output, expected = model(**inputs), alone(**inputs)
        output["loss"].backward()
        expected["loss"].backward()
        found[f"{mix} loss"] = error(output["loss"], expected["loss"])
        found[f"{mix} logits"] = error(cpcompile.unshard(output["logits"], model), expected["logits"])
        again = cpcompile.unshard(cpcompile.shard(expected["logits"], model), model)
        found[f"{mix} there and back"] = error(again, expected["logits"])
        found |= {f"{mix} {key}": x for key, x in errors(gradients(model), gradients(alone)).items()}
    return found


def packed_lm() -> PackedLM:
    torch.manual_seed(0)
    return PackedLM().double()


@pytest.mark.parametrize(
    ("strategy", "layout", "world_size", "batch_size"),
    [
        ("ring", "balanced", 2, 1),
        ("gather", "balanced", 4, 3),
        ("ulysses", "balanced", 2, 3),
        ("usp", "balanced", 4, 1),
        ("ring", "zig_zag_by_document", 4, 3),
        ("gather", "zig_zag_by_document", 2, 1),
        ("ulysses", "zig_zag_by_document", 4, 1),
    ],
)
def test_mixes_of_documents(pool: Any, strategy: str, layout: str, world_size: int, batch_size: int) -> None:
    for found in pool.run(world_size, trained_mixes, strategy, layout, batch_size):
        assert max(found.values()) < 1e-12, {key: x for key, x in found.items() if x >= 1e-12}


def compiled(rank: Any) -> dict[str, float]:
    """The same by `torch.compile`, whose outputs are those of the model alone."""
    torch._dynamo.reset()
    model, alone = packed_lm(), packed_lm()
    options = {"mesh": rank.mesh(), "inner": "eager", "strategy": "ring", "balancer": "balanced", "outputs": "full"}
    parallel = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    found: dict[str, float] = {}
    for mix in ("giant", "off_edges"):
        inputs = packed_batch(mix, 2)
        output, expected = parallel(**inputs), alone(**inputs)
        output["loss"].backward()
        expected["loss"].backward()
        assert set(output) == set(expected)
        found |= {f"{mix} {name}": error(output[name], x) for name, x in expected.items()}
        found |= {f"{mix} {name}": x for name, x in errors(gradients(model), gradients(alone)).items()}
    return found


def test_documents_by_torch_compile(pool: Any) -> None:
    for found in pool.run(2, compiled):
        assert max(found.values()) < 1e-12, {key: x for key, x in found.items() if x >= 1e-12}
