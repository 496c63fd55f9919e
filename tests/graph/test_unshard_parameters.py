"""Parameters that FSDP shards are gathered in the graph, once each, and again in backward where they are resharded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import fx
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import cpcompile
from cpcompile import _torch
from cpcompile.errors import NoRule
from cpcompile.ir.parameter_shard import ParameterShard
from cpcompile.passes.unshard_parameters import unshard_parameters
from tests.models import batch, loss_of, make

RANKS = 4
GATHER = torch.ops._c10d_functional.all_gather_into_tensor.default
SCATTER = torch.ops._c10d_functional.reduce_scatter_tensor.default


@pytest.fixture
def ranks() -> Iterator[None]:
    """Make this process the first of four whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


def shard_of(shape: tuple[int, ...], stays_whole: bool = False) -> ParameterShard:
    return ParameterShard(
        shape, 0, RANKS, "group", 1, "", torch.float32, torch.float32, torch.float32, 1.0, stays_whole, True
    )


def two_uses() -> fx.GraphModule:
    graph = fx.Graph()
    x, weight, other = (graph.placeholder(name) for name in ("x", "weight", "other"))
    x.meta["val"], other.meta["val"] = torch.empty(3, 8), torch.empty(6, 8)
    weight.meta["val"] = torch.empty(6, 8)
    first = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    second = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    graph.output((first, second))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_refuses_a_parameter_that_the_model_writes() -> None:
    gm = two_uses()
    (output,) = gm.graph.find_nodes(op="output")
    weight = next(node for node in gm.graph.find_nodes(op="placeholder") if node.name == "weight")
    with gm.graph.inserting_before(output):
        gm.graph.call_function(torch.ops.aten.copy_.default, (weight, weight))
    with pytest.raises(NoRule, match=r"writes to a parameter that FSDP shards(.|\n)*ignored_params"):
        unshard_parameters(gm, shards={"weight": shard_of((6, 8))})


def test_one_gather_for_all_uses() -> None:
    gm = two_uses()
    assert (
        unshard_parameters(gm, shards={"weight": shard_of((6, 8)), "other": shard_of((6, 8))}) == 1
    )  # one is not used
    (whole,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.unshard_parameter.default)
    (weight,) = (node for node in gm.graph.find_nodes(op="placeholder") if node.name == "weight")
    assert len(whole.users) == 2 and list(weight.users) == [whole]
    assert weight.meta["val"].shape == (2, 8) and whole.meta["val"].shape == (6, 8)  # the last rank's rows are padding
    gm.graph.lint()


def test_other_parameters_are_left_alone() -> None:
    gm = two_uses()
    before = str(gm.graph)
    assert unshard_parameters(gm, shards={}) == 0
    assert str(gm.graph) == before


def compiled(monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Return the forward and backward graph of a sharded model."""
    torch._dynamo.reset()
    graphs = []

    def inner(name: str, *settings: Any) -> Any:
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def keep(gm: fx.GraphModule, inputs: Any) -> Any:
            from functorch.compile import make_boxed_func

            graphs.append(gm)
            return make_boxed_func(gm)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)

    monkeypatch.setattr(_torch, "inner_compiler", inner)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("cp",))
    model = make("rotary", dtype=torch.float32)
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh)
    cpcompile.apply(model, mesh, strategy="ring", check_inputs="never")
    loss_of(model(**batch(model, 64))).backward()
    forward, backward = graphs
    return forward, backward


def count(gm: fx.GraphModule, target: Any) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("reshards", [True, False])
def test_gathered_again_in_backward(ranks: None, monkeypatch: pytest.MonkeyPatch, reshards: bool) -> None:
    forward, backward = compiled(monkeypatch, reshard_after_forward=reshards)
    num_parameters = len(list(make("rotary").parameters()))
    assert count(forward, GATHER) == count(backward, SCATTER) == num_parameters
    saved = [x.meta["val"] for x in forward.graph.output_node().args[0] if x is not None and x.op != "placeholder"]
    # What depends on tokens has a symbolic size; of the root only the head's weight is kept for backward, which has 61 rows.
    sizes = [tuple(x.shape) for x in saved if isinstance(x, torch.Tensor) and x.dim() == 2]
    whole = [size for size in sizes if all(isinstance(n, int) for n in size) and 61 not in size]
    assert bool(whole) == (not reshards)
    assert (count(backward, GATHER) > 0) == reshards
