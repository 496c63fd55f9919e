"""Selective activation checkpoints: what is saved follows the policy, and nothing else changes."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cpcompile
from cpcompile import CPError, InternalError, verify
from cpcompile._torch.joint_graph import JointPass, in_inductor
from cpcompile.capture.checkpoint_policies import KERNELS
from cpcompile.compile import inner as inner_module
from cpcompile.compile.saved_results import is_view, policy_of, tag_saved_results, tags_of
from cpcompile.ir.checkpoint_answers import set_answers
from cpcompile.ir.operator_call import Call, value_of
from cpcompile.memory.timeline import root_of
from cpcompile.options.config import Config
from tests.graph.small_models import TinyLM, batch, planned

aten = torch.ops.aten
ContextFn = Callable[[], Any]
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
FLASH = aten._scaled_dot_product_flash_attention.default  # a kernel of GPUs
PRODUCTS = (aten.mm.default, aten.addmm.default)
ATTENTION = torch.ops.cpcompile.ring_attention.default
ULYSSES = torch.ops.cpcompile.ulysses_attention.default
ULYSSES_BACKWARD = torch.ops.cpcompile.ulysses_attention_backward.default
NOWHERE = "a model without checkpoints"


def list_of(*saved: Any) -> ContextFn:
    return functools.partial(create_selective_checkpoint_contexts, list(saved))


def asking(policy: Callable[..., Any]) -> ContextFn:
    return lambda: create_selective_checkpoint_contexts(policy)


def every_second(*counted: Any) -> ContextFn:
    """Return contexts that save the first of some operators, the third, ..., and all attentions, as torchtitan does."""

    def contexts() -> Any:
        count: dict[str, int] = defaultdict(int)

        def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            # Before torch 2.13 it is asked once more in backward, on one device.
            phase = "again" if ctx.is_recompute else "first"
            count[phase] += func in counted
            is_skipped = func in counted and count[phase] % 2 == 0
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
# What backward computes again: attention, products with a bias and without, batched products, sines.
AGAIN = {
    "none": (0, 1, 1, 1, 1),
    "products": (0, 0, 0, 1, 1),
    "every second product": (0, 0, 1, 1, 1),
    "everything": (0, 0, 0, 0, 0),
    "nothing": (1, 1, 1, 1, 1),
    "batched products": (0, 1, 1, 0, 1),
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


def partitioned(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, inner: str = "aot_eager", **given: Any
) -> list[fx.GraphModule]:
    """Return the forward and backward graph of the first of two ranks."""
    import torch._functorch.partitioners as partitioners
    import torch._inductor.compile_fx as compile_fx

    graphs: list[fx.GraphModule] = []
    home, name = {
        "aot_eager": (partitioners, "default_partition"),
        "inductor": (compile_fx, "min_cut_rematerialization_partition"),
    }[inner]
    partition = getattr(home, name)

    def divided(*args: Any, **kwargs: Any) -> Any:
        graphs.extend(partition(*args, **kwargs))
        raise PartitionedError  # nothing needs to be compiled

    monkeypatch.setattr(home, name, divided)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    # What a loss in chunks computes is not counted.
    options = {"strategy": "ring", "check_inputs": "never", "dynamic": False, "loss_chunk": 0} | given
    cpcompile.apply(model, mesh, inner=inner, **options)
    with pytest.raises(InternalError, match="PartitionedError"):
        model(**batch(16))
    monkeypatch.setattr(home, name, partition)
    return graphs


def computed(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(len(gm.graph.find_nodes(op="call_function", target=target)) for target in targets)


def saved(gm: fx.GraphModule) -> list[fx.Node]:
    """Return what forward gives to backward, but for inputs."""
    return [x for x in gm.graph.output_node().args[0] if isinstance(x, fx.Node) and x.op != "placeholder"]


def again(backward: fx.GraphModule) -> tuple[int, ...]:
    """Return what backward computes again, beside six products, two batched ones and a sine that are gradients."""
    targets = (ATTENTION, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.sin.default)
    own = (0, 0, 6, 2, 1)
    return tuple(computed(backward, target) - count for target, count in zip(targets, own, strict=True))


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    ("name", "inner"),
    [
        *((name, "aot_eager") for name in POLICIES),
        ("every second product", "inductor"),
        pytest.param("batched products", "inductor", marks=pytest.mark.slow),
    ],
)
def test_backward_computes_again_what_is_not_saved(monkeypatch: pytest.MonkeyPatch, name: str, inner: str) -> None:
    forward, backward = partitioned(monkeypatch, Checkpointed(POLICIES[name]), inner)
    assert again(backward) == AGAIN[name]
    kept = {node.target for node in saved(forward)}
    assert (aten.bmm.default in kept) == (name == "batched products")
    # The operands of the batched product are copies that the same call makes.
    assert (aten.clone.default in kept) == (name == "everything")
    assert not any(is_view(node.target) for node in saved(forward) if "ac_graph_id" in node.meta)


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("context_fn", "options", "keeps_heads"),
    [(NOWHERE, {}, True), (NOWHERE, {"heads_per_message": 1}, False), (None, {}, False)],
    ids=["no checkpoint", "groups of heads", "checkpoint"],
)
def test_heads_are_kept_or_their_tokens(
    monkeypatch: pytest.MonkeyPatch, inner: str, context_fn: Any, options: dict[str, Any], keeps_heads: bool
) -> None:
    model = TinyLM() if context_fn is NOWHERE else Checkpointed(context_fn)
    forward, backward = partitioned(monkeypatch, model, inner, strategy="ulysses", **options)
    (attention,) = forward.graph.find_nodes(op="call_function", target=ULYSSES)
    (gradient,) = backward.graph.find_nodes(op="call_function", target=ULYSSES_BACKWARD)
    call = Call.of(gradient)
    assert computed(backward, ULYSSES) == 0
    assert {call.shape(name)[2] for name in ("q", "k", "v", "out")} == {0 if keeps_heads else 8}
    assert sum(value_of(x).numel() > 0 for x in call["kept"]) == (4 if keeps_heads else 0)
    # In a checkpoint q, k and v are computed again, with heads kept nothing reads them.
    kept = {root_of(node) for node in saved(forward)}
    assert bool(kept & {root_of(x) for x in attention.all_input_nodes}) == bool(options)


def test_what_compilers_make_of_an_operator_follows_it() -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2))
    set_answers(
        node,
        [(aten.gelu.default, CheckpointPolicy.PREFER_SAVE), (aten.gelu.default, SAVE), (aten.add.Tensor, RECOMPUTE)],
    )
    assert policy_of(node) is None, "not in a checkpoint"
    node.meta["recompute"] = RECOMPUTE
    assert policy_of(node) is None, "another operator"
    node.meta["original_aten"] = aten.gelu.default
    assert tag_saved_results(graph) == 1
    assert node.meta["recompute"] == SAVE


def answers(model: nn.Module, **options: Any) -> list[tuple[Any, CheckpointPolicy | None]]:
    """Return the operators of the graph of a rank, and what is to be done with their results."""
    options = {"strategy": "ring", "recompute_attention": True} | options  # nothing is saved but what a policy says
    nodes = planned(model, batch(), **options).graph.graph.nodes
    return [(node.target, policy_of(node)) for node in nodes if node.op == "call_function"]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_any_kernel_of_attention_is_ours(kernel: Any) -> None:
    assert dict(answers(Checkpointed(list_of(kernel))))[ATTENTION] == SAVE


class Attending(TinyLM):
    """Three attentions in one checkpoint, perhaps by hand."""

    def __init__(self, context_fn: ContextFn, is_by_hand: bool = False) -> None:
        super().__init__()
        self.context_fn, self.is_by_hand = context_fn, is_by_hand

    def attend(self, x: Tensor) -> Tensor:
        if not self.is_by_hand:
            return super().attend(x)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def layers(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.attend(x)
        return x

    def logits(self, input_ids: Tensor) -> Tensor:
        x = checkpoint(self.layers, self.embedding(input_ids), use_reentrant=False, context_fn=self.context_fn)
        return self.head(x)


def test_every_second_attention() -> None:
    found = answers(Attending(every_second(FLASH)))
    assert [policy for target, policy in found if target is ATTENTION] == [SAVE, None, SAVE]


def test_attention_by_hand_is_saved_with_its_last_product() -> None:
    found = answers(Attending(list_of(aten.bmm.default), is_by_hand=True))
    assert [policy for target, policy in found if target is ATTENTION] == [SAVE] * 3


def logged() -> tuple[ContextFn, list[list[Any]]]:
    """Return contexts that save nothing, and the operators that each of their policies is asked about."""
    logs: list[list[Any]] = []

    def contexts() -> Any:
        log: list[Any] = []
        logs.append(log)
        return create_selective_checkpoint_contexts(lambda ctx, func, *args, **kwargs: bool(log.append(func)))

    return contexts, logs


def test_the_policy_is_asked_as_in_eager_mode() -> None:
    expected, eager = logged()
    Checkpointed(expected)(**batch())
    contexts, logs = logged()
    answers(Checkpointed(contexts))
    asked = [log for log in logs if len(log) > 2]  # others are asked for kernels of attention only
    assert len(asked) == len(eager) == 2
    for ours, theirs in zip(asked, eager, strict=True):
        assert [str(target).replace("_unsafe_", "") for target in ours] == [
            str(target).replace("_unsafe_", "") for target in theirs
        ]


@pytest.mark.parametrize(
    ("contexts", "texts"),
    [
        (lambda: (nullcontext(), nullcontext()), ("asks no policy", "create_selective_checkpoint_contexts")),
        (asking(lambda ctx, func, *args, **kwargs: 1 // 0), ("fails: ZeroDivisionError", "have no values")),
        (
            asking(lambda ctx, func, *args, **kwargs: CheckpointPolicy.MUST_CPU_OFFLOAD),
            ("MUST_CPU_OFFLOAD for aten.", "Answer MUST_SAVE"),
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(contexts: ContextFn, texts: tuple[str, ...]) -> None:
    with pytest.raises(CPError) as error:
        planned(Checkpointed(contexts), batch())
    assert all(text in str(error.value) for text in (*texts, "small_models.py:")), error.value


def test_graphs_that_differ_in_what_is_saved_are_not_taken_for_one() -> None:
    tags = {name: tags_of(planned(Checkpointed(POLICIES[name]), batch()).graph.graph) for name in POLICIES}
    assert len(set(tags.values())) == len(POLICIES)
    assert tags_of(planned(TinyLM(), batch()).graph.graph) == ""


def test_eager_says_once_that_it_saves_no_memory(caplog: pytest.LogCaptureFixture) -> None:
    inner_module.warn_of_kept_results.cache_clear()
    for _ in range(2):
        inner_module.compile_inner(planned(Checkpointed(None), batch()), [], Config(inner="eager"))
    inner_module.compile_inner(planned(TinyLM(), batch()), [], Config(inner="eager"))
    (message,) = (record.getMessage() for record in caplog.records if record.name == inner_module.__name__)
    assert "computes nothing again" in message


def test_passes_of_the_user_run_first() -> None:
    seen: list[str] = []
    config = torch._inductor.config
    own = JointPass(lambda graph: seen.append("own"), "key")
    with config.patch(joint_custom_pre_pass=lambda graph: seen.append("user")), in_inductor(own):
        config.joint_custom_pre_pass(fx.Graph())
        assert config.joint_custom_pre_pass.uuid() is None, "a pass without a name keeps the graph out of caches"
    assert seen == ["user", "own"]
    assert JointPass(tag_saved_results, "one").uuid() != JointPass(tag_saved_results, "other").uuid()
