"""Selective activation checkpoints: what is saved follows the policy, and nothing else changes."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cpcompile
from cpcompile import CPError, verify
from tests.graph.small_models import TinyLM, batch

aten = torch.ops.aten
ContextFn = Callable[[], Any]
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
FLASH = aten._scaled_dot_product_flash_attention.default  # a kernel of GPUs
PRODUCTS = (aten.mm.default, aten.addmm.default)
ATTENTION = torch.ops.cpcompile.ring_attention.default


def list_of(*saved: Any) -> ContextFn:
    return functools.partial(create_selective_checkpoint_contexts, list(saved))


def asking(policy: Callable[..., Any]) -> ContextFn:
    return lambda: create_selective_checkpoint_contexts(policy)


def every_second(*counted: Any) -> ContextFn:
    """Return contexts that save the first of some operators, the third, ..., and all attentions, as torchtitan does."""

    def contexts() -> Any:
        count: dict[str, int] = defaultdict(int)

        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            assert not ctx.is_recompute
            count["of them"] += func in counted
            is_skipped = func in counted and count["of them"] % 2 == 0
            return SAVE if func in (*counted, FLASH) and not is_skipped else RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return contexts


class Checkpointed(TinyLM):
    """Two layers in checkpoints, the first with one attention and two products, the second with a product of three dims."""

    def __init__(self, context_fn: ContextFn | None) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8, bias=False)
        self.mixed = nn.Parameter(torch.randn(2, 4, 4))
        self.options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}

    def first(self, x: Tensor) -> Tensor:
        return x + self.out(self.attend(x).sin()).cos()

    def second(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, 4)).transpose(1, 2)  # [B, H, S, D], which the product must copy
        return x + (heads @ self.mixed).transpose(1, 2).flatten(-2).tanh()

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for layer in (self.first, self.second):
            x = checkpoint(layer, x, use_reentrant=False, **self.options)
        return self.head(x)


POLICIES: dict[str, ContextFn | None] = {
    "none": None,
    "products": list_of(*PRODUCTS),
    "every second product": every_second(*PRODUCTS),
    "everything": asking(lambda *args, **kwargs: True),
    "nothing": asking(lambda *args, **kwargs: CheckpointPolicy.MUST_RECOMPUTE),
    "batched products": list_of(aten.bmm.default),
}
# How often backward computes (attention, products of two dims, products of three, cos, sin) again.
AGAIN = {
    "none": (1, 2, 0, 0, 1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_exact(name: str) -> None:
    model = Checkpointed(POLICIES[name]).double()
    found = verify(model, batch(13), world_size=2, dtype=torch.float64, strategy="ring")
    assert found.tolerance < 1e-12
    found.raise_if_wrong()


@pytest.fixture
def ranks() -> Iterator[None]:
    """Make this process the first of two whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class PartitionedError(Exception):
    """Ends a compilation when its graph is divided."""


def partitioned(monkeypatch: pytest.MonkeyPatch, model: nn.Module, inner: str = "aot_eager") -> list[fx.GraphModule]:
    """Return the forward and backward graph of the first of two ranks."""
    graphs: list[fx.GraphModule] = []
    if inner == "aot_eager":

        def kept(gm: fx.GraphModule, inputs: Any) -> Any:
            graphs.append(gm)
            return lambda *args: gm(*args)

        monkeypatch.setattr("torch._functorch.compilers.nop", kept)
    else:
        import torch._inductor.compile_fx as compile_fx

        partition = compile_fx.min_cut_rematerialization_partition

        def divided(*args: Any, **kwargs: Any) -> Any:
            graphs.extend(partition(*args, **kwargs))
            raise PartitionedError  # code for the CPU takes long to compile

        monkeypatch.setattr(compile_fx, "min_cut_rematerialization_partition", divided)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    cpcompile.apply(model, mesh, strategy="ring", inner=inner, check_inputs="never", dynamic=False)
    try:
        model(**batch(16)).backward()
    except CPError as error:
        if not isinstance(error.__cause__, PartitionedError) and "PartitionedError" not in str(error):
            raise
    return graphs


def computed(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for target in targets)


def saved(gm: fx.GraphModule) -> list[fx.Node]:
    """Return what forward gives to backward, but for inputs."""
    return [x for x in gm.graph.output_node().args[0] if isinstance(x, fx.Node) and x.op != "placeholder"]


def again(graphs: list[fx.GraphModule]) -> tuple[int, ...]:
    """Return how often backward computes attention, products (beyond those of gradients), and sines again."""
    forward, backward = graphs
    outputs = {node.name for node in saved(forward)}
    assert len(outputs) == len(saved(forward))
    return computed(backward, ATTENTION), computed(backward, *PRODUCTS), computed(backward, aten.bmm.default)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_debug(monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    for name, policy in POLICIES.items():
        torch._dynamo.reset()
        graphs = partitioned(monkeypatch, Checkpointed(policy), inner)
        for gm in graphs:
            print(
                inner,
                name,
                Counter(
                    str(n.target)
                    for n in gm.graph.nodes
                    if n.op == "call_function" and re.search("mm|attention|sin|cos|tanh|clone", str(n.target))
                ),
            )
        print([(str(n.target), tuple(n.meta["val"].shape)) for n in saved(graphs[0])])
