"""Inputs, meshes and axes that do not fit: a clear error on every rank, and no hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import cpcompile
from cpcompile.errors import ConfigError, InputError
from cpcompile.front.fingerprint import value_fingerprint
from tests.models import VOCABULARY, batch, error, errors, gradients, loss_of, make


def spoiled(inputs: dict[str, Any], kind: str) -> dict[str, Any]:
    """Return `inputs` changed as `kind` says."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if kind == "one value":
        ids = ids.clone()
        ids[1, 7] = (ids[1, 7] + 1) % VOCABULARY
    elif kind == "two values swapped":
        ids = ids.clone()
        ids[0, [0, 1]] = ids.new_tensor([4, 3])
    elif kind == "rows swapped":
        ids = ids.flip(0)
    elif kind == "shape":
        ids = ids[:, :-1]
    elif kind == "batch":
        return {name: x[:1] for name, x in inputs.items()}
    elif kind == "dtype":
        labels = labels.int()
    elif kind == "missing":
        return {"input_ids": ids}
    return {"input_ids": ids, "labels": labels}


DIFFERENCES = {
    "one value": "the input 'input_ids' differs between rank 0 and rank(s) 1 (int64[2, 31], in its values)",
    "two values swapped": "the input 'input_ids' differs between rank 0 and rank(s) 1",
    "rows swapped": "the input 'input_ids' differs between rank 0 and rank(s) 1",
    "shape": "the input 'input_ids' differs between rank 0 and rank(s) 1 (rank(s) 0, 2: int64[2, 31]; rank(s) 1: int64[2, 30])",
    "batch": "the input 'input_ids' differs between rank 0 and rank(s) 1 (rank(s) 0, 2: int64[2, 31]; rank(s) 1: int64[1, 31]; 1 more)",  # noqa: E501
    "dtype": "the input 'labels' differs between rank 0 and rank(s) 1 (rank(s) 0, 2: int64[2, 31]; rank(s) 1: int32[2, 31])",
    "missing": "the input 'labels' differs between rank 0 and rank(s) 1 (rank(s) 0, 2: int64[2, 31]; rank(s) 1: not given)",
}


def differ(rank: Any) -> dict[str, str]:
    """Return what each kind of difference on rank 1 says, with a good step after each."""
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), rank.mesh(), inner="eager")
    inputs = batch(make("rotary"), 31)
    inputs["input_ids"][0, [0, 1]] = torch.tensor([3, 4])
    texts = {}
    for kind in DIFFERENCES:
        with pytest.raises(InputError) as caught:
            model(**spoiled(inputs, kind) if rank.rank == 1 else inputs)
        texts[kind] = str(caught.value)
        loss_of(model(**inputs)).backward()
    return texts


def test_inputs_that_differ_are_named_on_every_rank(pool: Any) -> None:
    results = pool.run(3, differ)
    for kind, start in DIFFERENCES.items():
        for texts in results:
            assert texts[kind].startswith(start), texts[kind]
            assert texts[kind].endswith("must be given the same whole batch: shard data over the other axes only.")


def several_differ(rank: Any) -> str:
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), rank.mesh(), inner="eager")
    with pytest.raises(InputError) as caught:
        model(**batch(make("rotary"), 31, seed=rank.rank))
    return str(caught.value)


def test_all_ranks_that_differ_are_listed(pool: Any) -> None:
    for text in pool.run(4, several_differ):
        assert "between rank 0 and rank(s) 1, 2, 3" in text


def other_order(rank: Any) -> None:
    """Extra keyword arguments have no order that matters."""
    torch._dynamo.reset()
    model = cpcompile.apply(make("llama"), rank.mesh(), inner="eager")
    inputs = batch(make("llama"), 31) | {
        "num_items_in_batch": torch.tensor(40),
        "shift_labels": torch.ones(2, 31).long(),
    }
    model(**dict(reversed(list(inputs.items()))) if rank.rank else inputs)


def test_the_order_of_keyword_arguments_does_not_matter(pool: Any) -> None:
    pool.run(2, other_order)


def checked(rank: Any, mode: str) -> list[bool]:
    """Return whether the first and the second call with other inputs on each rank were refused."""
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), rank.mesh(), inner="eager", check_inputs=mode)
    same, other = batch(make("rotary"), 31), batch(make("rotary"), 31, seed=rank.rank)
    refused = []
    for inputs in (other, same, other):
        try:
            model(**inputs)
            refused.append(False)
        except InputError:
            refused.append(True)
    return refused


@pytest.mark.parametrize(
    ("mode", "refused"),
    [("always", [True, False, True]), ("first", [True, False, False]), ("never", [False, False, False])],
)
def test_modes(pool: Any, mode: str, refused: list[bool]) -> None:
    assert pool.run(2, checked, mode) == [refused] * 2


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(6),
        torch.arange(6, dtype=torch.uint8),
        torch.tensor([True, False, True]),
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(4, 3).to(torch.bfloat16),
        torch.randn(4, 3, dtype=torch.complex64),
        torch.tensor(3.0),
    ],
    ids=lambda x: str(x.dtype),
)
def test_the_fingerprint_depends_on_every_element_and_its_place(x: torch.Tensor) -> None:
    base = int(value_fingerprint(x))
    assert int(value_fingerprint(x.clone())) == base
    for i in range(x.numel()):
        other = x.clone()
        other.view(-1)[i] = ~other.view(-1)[i] if x.dtype == torch.bool else other.view(-1)[i] + 1
        assert int(value_fingerprint(other)) != base
    if x.numel() > 1:
        assert int(value_fingerprint(x.roll(1))) != base
    assert value_fingerprint(x.new_empty(0)) == 0


@pytest.mark.parametrize("values", [([0, 1, 1, 0], [1, 0, 0, 1]), ([5, 2, 5], [4, 4, 4])])
def test_the_fingerprint_is_not_linear(values: tuple[list[int], list[int]]) -> None:
    """Sums, and sums weighted by the place, are equal here."""
    one, other = (value_fingerprint(torch.tensor(x)) for x in values)
    assert one != other


def unfit(rank: Any) -> None:
    model = make("rotary", num_layers=1)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    unnamed = init_device_mesh("cpu", (2, 2))
    half = DeviceMesh("cpu", [0, 1], mesh_dim_names=("cp",))
    cases = [
        ({"mesh": rank.mesh(), "axis": "tp"}, "the mesh has no axis 'tp' (its axes: 'cp'; shape (4,))."),
        ({"mesh": square, "axis": "tp"}, "the mesh has no axis 'tp' (its axes: 'dp', 'cp'; shape (2, 2))."),
        ({"mesh": square}, "the mesh has 2 axes ('dp', 'cp'; shape (2, 2)): say which one shards the sequence"),
        ({"mesh": unnamed}, "the mesh has 2 axes (none has a name; shape (2, 2)): say which one"),
        (
            {"mesh": rank.process_group},
            "mesh must be a DeviceMesh (torch.distributed.init_device_mesh), not ProcessGroup",
        ),
        ({"mesh": None}, "mesh must be a DeviceMesh (torch.distributed.init_device_mesh), not NoneType."),
        (
            {"mesh": rank.mesh("context"), "axis": "contxt"},
            "the mesh has no axis 'contxt' (its axes: 'context'; shape (4,)).",
        ),
        ({"mesh": rank.mesh(), "axis": 0}, "axis=0 is an int: name an axis of the mesh ('cp'), or two, axis=("),
        ({"mesh": rank.mesh(), "stratgy": "ring"}, "unknown option 'stratgy': the options are strategy, balancer,"),
    ]
    if rank.rank >= 2:
        cases.append(
            ({"mesh": half}, f"rank {rank.rank} is not in the mesh [0, 1]: every rank that runs the model must be")
        )
    for arguments, start in cases:
        with pytest.raises(ConfigError) as caught:
            cpcompile.apply(model, **arguments)
        assert str(caught.value).startswith(start), str(caught.value)
        assert "forward" not in model.__dict__
    with pytest.raises(ConfigError, match=r"takes a torch\.nn\.Module, not function"):
        cpcompile.apply(unfit, rank.mesh())
    for function in (cpcompile.shard, cpcompile.unshard):
        with pytest.raises(ConfigError, match="is not context parallel"):
            function(torch.zeros(1, 4), model)


def test_meshes_and_options_that_do_not_fit(pool: Any) -> None:
    pool.run(4, unfit)


def elsewhere(rank: Any) -> None:
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), rank.mesh(), inner="eager", check_inputs="never")
    with pytest.raises(ConfigError, match="call the model before this"):
        cpcompile.shard(torch.zeros(1, 4), model)
    inputs = batch(make("rotary"), 31)
    with pytest.raises(InputError, match=r"on the meta device, without values: .*to_empty\(device='cpu'\)"):
        model.to("meta")(**{name: x.to("meta") for name, x in inputs.items()})


def test_other_devices(pool: Any) -> None:
    pool.run(2, elsewhere)


def wrong_lengths(rank: Any) -> None:
    torch._dynamo.reset()
    model = cpcompile.apply(make("rotary", num_layers=1), rank.mesh(), inner="eager")
    logits = model(**batch(make("rotary"), 31))["logits"]
    for arguments in ({"dim": 0}, {"dim": 2}, {"length": 64}):
        with pytest.raises(ConfigError, match="token slots, but a rank's part of"):
            cpcompile.unshard(logits, model, **arguments)
    assert cpcompile.unshard(logits, model, dim=-2).shape[1] == 31


def test_unshard_of_what_is_no_output(pool: Any) -> None:
    pool.run(2, wrong_lengths)


def on_a_sub_axis(rank: Any, name: str) -> dict[str, float]:
    """Errors where the axis is one of a 2 x 2 mesh: each row has a batch of its own."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp") if name == "cp" else ("cp", "dp"))
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    chosen = {"mesh": mesh["cp"]} if name == "sliced" else {"mesh": mesh, "axis": "cp"}
    cpcompile.apply(model, **chosen, strategy="ring", balancer="zig_zag", inner="eager")
    inputs = batch(alone, 31, seed=mesh.get_local_rank("dp"))
    losses = [loss_of(module(**inputs)) for module in (model, alone)]
    for loss in losses:
        loss.backward()
    return {"loss": error(*losses)} | errors(gradients(model), gradients(alone))


@pytest.mark.parametrize("name", ["cp", "outer", "sliced"])
def test_a_sub_axis(pool: Any, name: str) -> None:
    for found in pool.run(4, on_a_sub_axis, name):
        assert max(found.values()) < 1e-12, found
