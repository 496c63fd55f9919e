"""A pair of mesh axes shares each sequence: USP and the other strategies over the ranks of both, beside data parallelism too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from cpcompile.errors import ConfigError, InputError
from cpcompile.options.mesh import axis_of
from cpcompile.runtime.transport.choice import transport_of
from tests.models import batch, error, errors, gradients, logits_of, loss_of, make

FLOAT32 = 2e-5  # the transformers models cast to float32 themselves, even in float64: rounding, times the depth
PAIR = ("ring", "ulysses")
SHAPES = {(2, 2): PAIR, (1, 4): PAIR, (4, 1): PAIR, (2, 1, 2): ("dp", *PAIR), (2, 2, 1): ("dp", *PAIR)}


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=SHAPES[shape])


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = loss_of(model(**inputs))
    loss.backward()
    return loss.detach(), gradients(model)


def compare(mesh: DeviceMesh, name: str, seed: int, **options: Any) -> dict[str, float]:
    """Return the errors of the loss, of every gradient and of the joined logits against one device."""
    torch._dynamo.reset()
    model, alone = make(name), make(name)
    cpcompile.apply(model, mesh, axis=PAIR, **{"inner": "eager"} | options)
    found = {}
    for length in (31, 40):
        inputs = batch(alone, length + seed)
        (loss, grads), (expected, expected_grads) = step(model, inputs), step(alone, inputs)
        with torch.no_grad():
            logits = cpcompile.unshard(logits_of(model(**inputs)), model)
            found[f"logits at {length}"] = error(logits, logits_of(alone(**inputs)))
        found |= {f"loss at {length}": error(loss, expected)} | errors(grads, expected_grads)
        model.zero_grad()
        alone.zero_grad()
    return found


def train(rank: Any, name: str, shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, float]:
    """Ranks of other data-parallel groups have other batches."""
    mesh = mesh_of(shape)
    seed = mesh.get_local_rank("dp") if "dp" in SHAPES[shape] else 0
    return compare(mesh, name, seed, **options)


def assert_exact(results: list[dict[str, float]], tolerance: float = FLOAT32) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < tolerance, f"rank {rank}: {name} is off by {found[name]:.1e}"


@pytest.mark.always
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 2), "zig_zag"),
        pytest.param((2, 2), "contiguous", marks=pytest.mark.slow),
        pytest.param((1, 4), "zig_zag", marks=pytest.mark.slow),
        pytest.param((4, 1), "zig_zag", marks=pytest.mark.slow),
        pytest.param((2, 1, 2), "zig_zag", marks=pytest.mark.slow),
        ((2, 2, 1), "zig_zag"),
    ],
    ids=str,
)
def test_usp_trains_exactly(pool: Any, shape: tuple[int, ...], layout: str) -> None:
    assert_exact(pool.run(4, train, "llama", shape, {"strategy": "usp", "balancer": layout}, timeout=200))


@pytest.mark.parametrize("strategy", ["auto", pytest.param("ring", marks=pytest.mark.slow)])
def test_other_strategies_use_all_ranks_of_a_pair(pool: Any, strategy: str) -> None:
    assert_exact(pool.run(4, train, "llama", (2, 2), {"strategy": strategy}, timeout=200))


@pytest.mark.slow
def test_usp_compiles(pool: Any) -> None:
    assert_exact(pool.run(4, train, "llama", (2, 2), {"strategy": "usp", "inner": "inductor"}, timeout=300))


def through_submesh(rank: Any) -> dict[str, float]:
    mesh = mesh_of((2, 1, 2))
    return compare(mesh[PAIR], "llama", mesh.get_local_rank("dp"), strategy="usp")


def test_a_submesh_of_both_axes(pool: Any) -> None:
    assert_exact(pool.run(4, through_submesh, timeout=200))


def as_backend(rank: Any) -> dict[str, float]:
    torch._dynamo.reset()
    model, alone = make("llama"), make("llama")
    options = {"mesh": mesh_of((2, 2)), "axis": PAIR, "strategy": "usp", "inner": "eager"}
    compiled = torch.compile(model, backend="cpcompile", options=options)
    inputs = batch(alone, 31)
    loss, expected = loss_of(compiled(**inputs)), loss_of(alone(**inputs))
    loss.backward()
    expected.backward()
    return {"loss": error(loss.detach(), expected.detach())} | errors(gradients(model), gradients(alone))


def test_through_torch_compile(pool: Any) -> None:
    assert_exact(pool.run(4, as_backend, timeout=200))


def other_batches(rank: Any) -> str:
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), mesh_of((2, 2)), axis=PAIR, inner="eager")
    inputs = batch(model, 32)
    if rank.rank == 3:
        inputs["input_ids"] = inputs["input_ids"].flip(1)
    with pytest.raises(InputError) as caught:
        model(**inputs)
    return str(caught.value)


def test_inputs_are_compared_over_all_ranks_of_the_pair(pool: Any) -> None:
    assert all("rank 0 and rank(s) 3" in text for text in pool.run(4, other_batches))


def refusals(rank: Any) -> list[str]:
    mesh, flat = mesh_of((2, 2)), rank.mesh()
    backwards = DeviceMesh("cpu", [[3, 2], [1, 0]], mesh_dim_names=PAIR)
    pairs = [(mesh, ("ring", "heads")), (mesh, ("ring", "ring")), (mesh, ("ulysses", "ring")), (flat, PAIR)]
    pairs += [(mesh, ("ring",)), (mesh, None), (backwards, PAIR)]
    texts = []
    for given, axis in pairs:
        with pytest.raises(ConfigError) as caught:
            cpcompile.apply(make("rotary"), given, axis=axis)
        texts.append(str(caught.value))
    with pytest.raises(ConfigError) as caught:
        cpcompile.apply(make("rotary"), flat, strategy="usp")
    return [*texts, str(caught.value)]


def test_axes_that_are_no_pair(pool: Any) -> None:
    for texts in pool.run(4, refusals):
        expected = (
            "has no axis 'heads'", "is no pair", "not in the order of the mesh", "has no axis 'ring', 'ulysses'",
            "is no pair", "axis=('ring axis', 'ulysses axis')", "must be in ascending order", "strategy='usp' exchanges",
        )  # fmt: skip
        for text, part in zip(texts, expected, strict=True):
            assert part in text


def axes(rank: Any) -> list[Any]:
    mesh = mesh_of((2, 2))
    found = [axis_of(mesh, PAIR), axis_of(mesh, PAIR)]
    return [(a.rank, a.world_size, a.inner_size, len(set(a.groups)), a == found[0]) for a in found]


def test_ranks_are_outer_before_inner_and_groups_are_made_once(pool: Any) -> None:
    assert pool.run(4, axes) == [[(rank, 4, 2, 3, True)] * 2 for rank in range(4)]


def transports(rank: Any) -> list[str]:
    mesh = mesh_of((2, 2))
    axis = axis_of(mesh, PAIR)
    cpcompile.apply(make("rotary"), mesh, axis=PAIR, transport="p2p")
    with pytest.raises(ConfigError, match="transport='symmetric' needs memory that GPUs share"):
        cpcompile.apply(make("rotary"), mesh, axis=PAIR, transport="symmetric")
    return [transport_of(group) for group in axis.groups]


def test_the_transport_is_that_of_all_groups(pool: Any) -> None:
    assert pool.run(4, transports) == [["p2p"] * 3] * 4
