"""Models that `fully_shard` wrapped, on gloo ranks against the untouched one on one device: loss, every gradient, training."""

from __future__ import annotations

import contextlib
import dataclasses
import unittest.mock
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from functorch.compile import make_boxed_func
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import cpcompile
from cpcompile._torch import fsdp
from cpcompile.compile.overlap import overlapped
from cpcompile.options.config import Config
from tests.graph.test_outline_layers import seen
from tests.models import batch, error, errors, loss_of, make

EXACT = 1e-12  # float64
FLOAT32 = 2e-5  # rounding of float32, in which such a model or such sums run, times the depth
LENGTH = 29  # no number of ranks divides it, nor the widths of some layers


def blocks_of(model: nn.Module) -> nn.ModuleList:
    found = model.blocks if hasattr(model, "blocks") else model.model.layers
    assert isinstance(found, nn.ModuleList)
    return found


def wrap(model: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """Wrap blocks and root; an output dtype is for what leaves the model."""
    policy = options.get("mp_policy", MixedPrecisionPolicy())
    of_blocks = options | {"mp_policy": dataclasses.replace(policy, output_dtype=None)}
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, **of_blocks)
    fully_shard(model, mesh=mesh, **options)


def meshes(rank: Any, data: int) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the mesh of (data, context) ranks, or of context ranks only, and the one to shard over."""
    if data == 1:
        return rank.mesh(), rank.mesh()
    assert rank.world_size == 4, "meshes of two axes are made by all processes"
    mesh = init_device_mesh("cpu", (data, rank.world_size // data), mesh_dim_names=("dp", "cp"))
    return mesh, mesh["dp", "cp"]._flatten("dp_cp")


def new(
    mesh: DeviceMesh,
    sharded_over: DeviceMesh | None,
    name: str,
    *,
    when: str = "before",
    layers: int = 1,
    **options: Any,
) -> Any:
    """Return (the context-parallel model sharded over a mesh, an untouched one)."""
    torch._dynamo.reset()
    policy = options.pop("fsdp", {})
    model, alone = make(name, num_layers=layers), make(name, num_layers=layers)
    if when == "before" and sharded_over is not None:
        wrap(model, sharded_over, **policy)
    cpcompile.apply(model, mesh, axis="cp", **{"inner": "eager"} | options)
    if when == "after" and sharded_over is not None:
        wrap(model, sharded_over, **policy)
    return model, alone


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def backward(model: nn.Module, alone: nn.Module, mesh: DeviceMesh, seed: int = 0) -> float:
    """Back-propagate, each data-parallel rank from a batch of its own; returns the error of the loss."""
    data, own = (mesh["dp"].size(), mesh["dp"].get_local_rank()) if mesh.ndim == 2 else (1, 0)
    batches = [batch(alone, LENGTH, seed=seed + index) for index in range(data)]
    loss = loss_of(model(**batches[own]))
    loss.backward()
    losses = [loss_of(alone(**each)) for each in batches]
    torch.stack(losses).mean().backward()
    return error(loss.detach(), losses[own].detach())


def step(model: nn.Module, alone: nn.Module, mesh: DeviceMesh, seed: int = 0) -> dict[str, float]:
    """Back-propagate and return the errors of the loss and of every gradient."""
    found = {"loss": backward(model, alone, mesh, seed)}
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    return found | errors(whole_gradients(model), expected)


def train(model: nn.Module, alone: nn.Module, mesh: DeviceMesh, steps: int = 2, seed: int = 0) -> dict[str, float]:
    """Return the errors of clipped steps: losses, gradients, and the parameters at the end.

    Not AdamW, which makes of a gradient that is rounding only a step as long as any.
    """
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9) for m in (model, alone)]
    found: dict[str, float] = {}
    for index in range(steps):
        for name, value in step(model, alone, mesh, seed=seed + 10 * index).items():
            found[f"{name} {index}"] = value
        norms = [nn.utils.clip_grad_norm_(m.parameters(), 0.5) for m in (model, alone)]
        norm = norms[0].full_tensor() if isinstance(norms[0], DTensor) else norms[0]
        found[f"norm {index}"] = error(norm, norms[1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ours = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return found | {f"{name} trained": error(ours[name].detach(), p.detach()) for name, p in alone.named_parameters()}


def assert_exact(results: list[dict[str, float]], tolerance: float = EXACT) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < tolerance, f"rank {rank}: {name} is off by {found[name]:.1e}"


def trained(rank: Any, data: int, name: str, over: str, when: str, options: dict[str, Any]) -> dict[str, float]:
    mesh, flat = meshes(rank, data)
    sharded_over = flat if over == "dp_cp" else mesh if over == "hsdp" else mesh[over] if mesh.ndim > 1 else mesh
    model, alone = new(mesh, sharded_over, name, when=when, **options)
    found = train(model, alone, mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters()), "parameters stay FSDP's"
    held = [group.comm_ctx.all_gather_state for group in fsdp._groups_of(fsdp._state_of(model))]
    assert not any(held), "what FSDP's own hook gathered at the first call is given back"
    assert isinstance(model, FSDPModule) and all(isinstance(block, FSDPModule) for block in blocks_of(model))
    return found


@pytest.mark.parametrize(
    ("world_size", "data", "over", "when"),
    [
        (1, 1, "dp_cp", "before"),
        (2, 1, "dp_cp", "before"),
        pytest.param(2, 1, "cp", "after", marks=pytest.mark.slow),
        pytest.param(4, 4, "dp_cp", "after", marks=pytest.mark.slow),
        (3, 1, "cp", "before"),
        (4, 2, "dp_cp", "before"),
        pytest.param(4, 2, "dp", "after", marks=pytest.mark.slow),
        (4, 2, "hsdp", "before"),
        pytest.param(4, 1, "cp", "after", marks=pytest.mark.slow),
    ],
)
def test_trains_exactly(pool: Any, world_size: int, data: int, over: str, when: str) -> None:
    assert_exact(pool.run(world_size, trained, data, "rotary", over, when, {}))


@pytest.mark.parametrize(
    ("name", "inner", "strategy"),
    [("nanogpt", "eager", "ring"), ("rotary", "aot_eager", "ulysses")],
)
def test_tied_weights_and_compilers(pool: Any, name: str, inner: str, strategy: str) -> None:
    options = {"inner": inner, "strategy": strategy, "layers": 2}
    assert_exact(pool.run(2, trained, 1, name, "dp_cp", "before", options, timeout=200))


def overlapping(rank: Any, prefetch: int, num_layers: int) -> tuple[dict[str, float], list[int]]:
    """Errors of training, and in each graph the most gathers that were under way at once."""
    most = []

    def recorded(*args: Any, **kwargs: Any) -> list[int]:
        order = overlapped(*args, **kwargs)
        place = {i: position for position, i in enumerate(order)}
        spans = [(place[start], place[wait]) for start, wait, _ in args[1]]
        most.append(max(sum(a <= start < b for a, b in spans) for start, _ in spans))
        return order

    uncached = torch._inductor.config.patch(force_disable_caches=True)
    with unittest.mock.patch("cpcompile.compile.inner.overlapped", recorded), uncached:
        options = {"inner": "inductor", "prefetch": prefetch, "layers": num_layers}
        return trained(rank, 1, "rotary", "dp_cp", "before", options), most


@pytest.mark.slow
@pytest.mark.parametrize(("prefetch", "num_layers"), [(0, 2), (1, 2), (1, 5)])  # four equal layers are outlined
def test_gathers_overlap(pool: Any, prefetch: int, num_layers: int) -> None:
    results = pool.run(2, overlapping, prefetch, num_layers, timeout=280)
    assert_exact([found for found, _ in results])
    for _, most in results:
        assert not most if not prefetch else min(most) > 4, most  # a block has more parameters


def outlined(rank: Any, reshard: bool) -> tuple[dict[str, float], list[tuple[int, int, int]]]:
    """Errors of training with equal layers as calls; in each graph the calls, the gathers outside of them, and returned views."""
    graphs = []

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        targets = [str(node.target) for node in gm.graph.nodes]
        gathers = sum("all_gather" in target for target in targets)
        graphs.append((targets.count("invoke_subgraph"), gathers, len(seen(gm))))
        return make_boxed_func(gm)

    options = {"inner": "aot_eager", "layers": 4, "fsdp": {"reshard_after_forward": reshard}}
    with (
        unittest.mock.patch("torch._functorch.compilers.nop", compiler),
        unittest.mock.patch.object(Config, "outlines", True),
    ):
        return trained(rank, 1, "rotary", "dp_cp", "before", options), graphs


@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_equal_layers_gather_outside(pool: Any, reshard: bool) -> None:
    results = pool.run(2, outlined, reshard, timeout=200)
    assert_exact([found for found, _ in results])
    for _, graphs in results:
        (forward, gathered, views), (backward, again, _) = graphs
        assert forward == backward == 4 and not views, graphs
        assert gathered > 5 and bool(again) == reshard, graphs


@pytest.mark.slow
@pytest.mark.parametrize("reshard", [True, False, 2])
def test_reshards_as_told(pool: Any, reshard: bool | int) -> None:
    options = {"inner": "aot_eager", "layers": 2, "fsdp": {"reshard_after_forward": reshard}}
    assert_exact(pool.run(4, trained, 2, "rotary", "dp_cp", "before", options))


@pytest.mark.slow
def test_transformers_under_checkpoints(pool: Any) -> None:
    assert_exact(pool.run(2, checkpointed, timeout=200), FLOAT32)


def checkpointed(rank: Any) -> dict[str, float]:
    mesh, flat = meshes(rank, 1)
    model, alone = new(mesh, None, "llama", inner="aot_eager")
    model.train()
    model.activation_checkpointing_enable() if hasattr(model, "activation_checkpointing_enable") else (
        model.gradient_checkpointing_enable()
    )
    wrap(model, flat)
    return train(model, alone, mesh)


def in_mixed_precision(rank: Any, policy: dict[str, Any]) -> dict[str, float]:
    """Errors where a float64 model computes in float32, against a float32 one."""
    mesh, flat = meshes(rank, 2 if rank.world_size == 4 else 1)
    model, alone = new(mesh, flat, "rotary", fsdp={"mp_policy": MixedPrecisionPolicy(**policy)})
    found = step(model, alone.float(), mesh)
    assert all(p.dtype == p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)
    logits = model(**batch(alone, LENGTH))["logits"]
    assert logits.dtype == policy.get("output_dtype", torch.float32)
    return found


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param({"param_dtype": torch.float32}, marks=pytest.mark.slow),
        {"param_dtype": torch.float32, "reduce_dtype": torch.float64},
        {"param_dtype": torch.float32, "output_dtype": torch.float64},
    ],
)
def test_mixed_precision(pool: Any, policy: dict[str, Any]) -> None:
    assert_exact(pool.run(4, in_mixed_precision, policy), FLOAT32)


def embeds_are_cast(rank: Any) -> dict[str, float]:
    """Inputs of blocks and of the model are cast where the policy says so."""
    mesh, flat = meshes(rank, 1)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32)
    model, alone = new(mesh, flat, "rotary", fsdp={"mp_policy": policy})
    inputs = batch(alone, LENGTH)
    embeds = torch.randn(2, LENGTH, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = loss_of(model(inputs_embeds=embeds, labels=inputs["labels"]))
    expected = loss_of(alone.float()(inputs_embeds=embeds.float(), labels=inputs["labels"]))
    return {"loss": error(loss.detach(), expected.detach())}


def test_inputs_are_cast(pool: Any) -> None:
    assert_exact(pool.run(2, embeds_are_cast), FLOAT32)


def from_meta(rank: Any) -> dict[str, float]:
    mesh, flat = meshes(rank, 1)
    alone = make("rotary", num_layers=1)
    with torch.device("meta"):
        model = make("rotary", num_layers=1)
    wrap(model, flat)
    cpcompile.apply(model, mesh, axis="cp", inner="eager")
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True)
    torch.distributed.checkpoint.state_dict.set_model_state_dict(model, alone.state_dict(), options=options)
    return train(model, alone, mesh)


def test_meta_init(pool: Any) -> None:
    assert_exact(pool.run(2, from_meta))


def frozen(rank: Any, inner: str) -> dict[str, float]:
    """Some parameters are frozen, one of them only after the first step."""
    mesh, flat = meshes(rank, 1)
    model, alone = new(mesh, None, "rotary", inner=inner)
    for m in (model, alone):
        m.blocks[0].qkv.weight.requires_grad_(False)
    wrap(model, flat)
    found = step(model, alone, mesh)
    for m in (model, alone):
        m.zero_grad()
        m.head.weight.requires_grad_(False)
    again = step(model, alone, mesh, seed=5)
    assert model.head.weight.grad is None and model.blocks[0].qkv.weight.grad is None
    return found | {f"{name} again": value for name, value in again.items()}


@pytest.mark.parametrize("inner", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_frozen_parameters(pool: Any, inner: str) -> None:
    assert_exact(pool.run(2, frozen, inner))


def accumulated(rank: Any, how: str) -> dict[str, float]:
    mesh, flat = meshes(rank, 2)
    model, alone = new(mesh, mesh["dp"] if how == "no_sync of dp" else flat, "rotary")
    for index in range(2):
        model.set_requires_gradient_sync(False)
        with cpcompile.no_sync(model) if how != "requires_gradient_sync" else contextlib.nullcontext():
            backward(model, alone, mesh, seed=7 * index)
    model.set_requires_gradient_sync(True)
    return step(model, alone, mesh, seed=14)


@pytest.mark.parametrize(
    "how", ["requires_gradient_sync", pytest.param("no_sync of dp_cp", marks=pytest.mark.slow), "no_sync of dp"]
)
def test_accumulation(pool: Any, how: str) -> None:
    assert_exact(pool.run(4, accumulated, how))


def save(rank: Any, folder: str) -> dict[str, float]:
    mesh, flat = meshes(rank, 2)
    model, alone = new(mesh, flat, "rotary")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step(model, alone, mesh)
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: float(x.double().sum()) for name, x in whole.items()}


def load(rank: Any, folder: str) -> tuple[dict[str, float], dict[str, float]]:
    """Load what other ranks saved, and train on: the sums of the weights, and the errors of a step against one device."""
    mesh, flat = meshes(rank, 1)
    model, _ = new(mesh, flat, "rotary", when="after")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in whole.items()}
    alone = make("rotary", num_layers=1)
    alone.load_state_dict(whole)
    found = step(model, alone, mesh)
    optimizer.step()
    return {name: float(x.double().sum()) for name, x in whole.items()}, found


def test_checkpoints_move_between_meshes(pool: Any, tmp_path: Any) -> None:
    """2 x 2 ranks save; 4 that share one sequence load and train on, and so does a process without ranks."""
    (saved, *_) = pool.run(4, save, str(tmp_path))
    alone = make("rotary", num_layers=1)
    weights = {"model": alone.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there are no ranks
        dcp.load(weights, checkpoint_id=str(tmp_path), no_dist=True)
    loaded = {name: float(x.double().sum()) for name, x in weights["model"].items()}
    for sums, found in [*pool.run(4, load, str(tmp_path)), (loaded, {"loss": 0.0})]:
        assert all(abs(sums[name] - total) < 1e-9 for name, total in saved.items())
        assert_exact([found])


def removed(rank: Any) -> dict[str, float]:
    """`remove` gives FSDP its hooks back: the model runs as FSDP2 runs it."""
    mesh, flat = meshes(rank, 1)
    model, alone = new(mesh, flat, "rotary")
    found = step(model, alone, mesh)
    cpcompile.remove(model)
    model.zero_grad()
    alone.zero_grad()
    again = step(model, alone, mesh, seed=3)  # every rank has the whole batch: the mean of equal gradients
    return found | {f"{name} removed": value for name, value in again.items()}


def test_remove(pool: Any) -> None:
    assert_exact(pool.run(2, removed))


def refusal(rank: Any, kind: str) -> str:
    mesh, flat = meshes(rank, 2)
    torch._dynamo.reset()
    model = make("rotary", num_layers=1)
    axis = "cp"
    if kind == "offload":
        wrap(model, flat, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif kind == "tensor parallel":
        parallelize_module(model.blocks[0].mlp, mesh["dp"], {"0": ColwiseParallel()})
    elif kind == "overlap":
        wrap(model, mesh["dp"])
        mesh, axis = flat, "dp_cp"
    else:
        wrap(model, flat)
        compiled = torch.compile(model, backend="cpcompile", options={"mesh": mesh, "axis": axis, "inner": "eager"})
        try:
            compiled(**batch(model, LENGTH))
        except Exception as error:
            return str(error)
    try:
        cpcompile.apply(model, mesh, axis=axis, inner="eager")(**batch(model, LENGTH))
    except cpcompile.CPError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("offload", ("embed.weight", "CPUOffloadPolicy", "Call fully_shard without it")),
        ("tensor parallel", ("blocks.0.mlp.0.weight", "tensor parallelism", "parallelize_module")),
        ("overlap", ("which hold 2 of the 4 ranks", "Shard it over all of these")),
        ("backend", ("fully_shard", "cpcompile.apply")),
    ],
)
def test_what_cannot_be_gathered_is_refused(pool: Any, kind: str, texts: tuple[str, ...]) -> None:
    for message in pool.run(4, refusal, kind):
        assert all(text in message for text in texts), message
