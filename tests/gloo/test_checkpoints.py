"""Activation checkpoints in every form on gloo ranks against one device, with FSDP2 and without; optimizers inside backward."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.compiled_autograd import _enable
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import cpcompile
from tests.models import Block, batch, error, errors, loss_of, make

EXACT = 1e-12  # float64
FLOAT32 = 2e-5  # transformers models cast to float32 themselves: rounding, times the depth
LENGTH = 29  # two ranks do not divide it
PREFIX = "_checkpoint_wrapped_module."
aten = torch.ops.aten


def every_second_product() -> Any:
    """Return contexts that save attention and every second product, as torchtitan's do."""
    count: dict[str, int] = defaultdict(int)

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_product = func in (aten.mm.default, aten.addmm.default)
        count["products"] += is_product
        is_attention = func is aten._scaled_dot_product_flash_attention.default
        is_saved = is_attention or (is_product and count["products"] % 2 == 1)
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


WRAPPERS: dict[str, Any] = {
    "selective": partial(checkpoint_wrapper, context_fn=every_second_product),
    "plain": checkpoint_wrapper,
    "reentrant": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
}


def by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients, whole, by the names of parameters without wrappers."""
    found = {name.replace(PREFIX, ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def compare(model: nn.Module, alone: nn.Module) -> dict[str, float]:
    """Return the errors of the loss and of every gradient."""
    losses = [loss_of(m(**batch(alone, LENGTH))) for m in (model, alone)]
    for loss in losses:
        loss.backward()
    return {"loss": error(losses[0].detach(), losses[1].detach())} | errors(by_name(model), by_name(alone))


def checkpointed(rank: Any, wrapper: str, inner: str, is_sharded: bool, options: dict[str, Any]) -> dict[str, float]:
    torch._dynamo.reset()
    model, alone = make("rotary"), make("rotary")
    for m in (model, alone):
        apply_activation_checkpointing(
            m, checkpoint_wrapper_fn=WRAPPERS[wrapper], check_fn=lambda module: isinstance(module, Block)
        )
    if is_sharded:
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=rank.mesh())  # type: ignore[arg-type]
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), inner=inner, **options)
    return compare(model, alone)


@pytest.mark.parametrize(
    ("wrapper", "inner", "is_sharded"),
    [
        ("selective", "eager", False),
        ("selective", "aot_eager", True),
        pytest.param("selective", "inductor", False, marks=pytest.mark.slow),
        ("plain", "aot_eager", True),
        ("reentrant", "aot_eager", True),
    ],
)
def test_checkpoint_wrapper(pool: Any, wrapper: str, inner: str, is_sharded: bool) -> None:
    for found in pool.run(2, checkpointed, wrapper, inner, is_sharded, {}, timeout=200):
        assert max(found.values()) < EXACT, found


@pytest.mark.parametrize(
    ("world_size", "inner", "options"),
    [
        pytest.param(2, "aot_eager", {}, marks=pytest.mark.slow),
        (3, "aot_eager", {"heads_per_message": 1}),
        pytest.param(2, "inductor", {"heads_per_message": 1}, marks=pytest.mark.slow),
    ],
)
def test_heads_are_exchanged_again_in_backward(pool: Any, world_size: int, inner: str, options: dict[str, Any]) -> None:
    given = {"strategy": "ulysses"} | options
    for found in pool.run(world_size, checkpointed, "plain", inner, False, given, timeout=200):
        assert max(found.values()) < EXACT, found


class Adapter(nn.Module):
    """A frozen product with an update of low rank."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen
        self.a = nn.Parameter(torch.randn(2, frozen.in_features, dtype=torch.float64) / 8)
        self.b = nn.Parameter(torch.randn(frozen.out_features, 2, dtype=torch.float64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x)
        return out + x @ self.a.T @ self.b.T


def adapted(rank: Any, inner: str) -> dict[str, float]:
    """A frozen model with adapters under gradient checkpoints, as PEFT and transformers prepare it."""
    torch._dynamo.reset()
    models = [make("llama").train().requires_grad_(False) for _ in range(2)]
    for model in models:
        torch.manual_seed(1)
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
        for layer in model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.v_proj = Adapter(layer.self_attn.v_proj)  # type: ignore[union-attr]
    cpcompile.apply(models[0], rank.mesh(), inner=inner)
    found = compare(models[0], models[1])
    assert len(found) == 5, "a loss, and two factors in each of two layers"
    return found


def test_adapters_of_a_frozen_model(pool: Any) -> None:
    for found in pool.run(2, adapted, "aot_eager"):
        assert max(found.values()) < FLOAT32, found


def stepping(model: nn.Module) -> None:
    """Take optimizer steps inside backward, and keep no gradients."""
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)


def trained_in_backward(rank: Any, inner: str) -> dict[str, float]:
    """Errors of the parameters, which FSDP2 shards, after three steps."""
    torch._dynamo.reset()
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    fully_shard(model.blocks[0], mesh=rank.mesh())  # type: ignore[index, arg-type]
    fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), inner=inner)
    for m in (model, alone):
        stepping(m)
        for index in range(3):
            loss_of(m(**batch(alone, LENGTH, seed=index))).backward()
        assert all(p.grad is None for p in m.parameters())
    weights = {name: p.full_tensor().detach() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    return errors(weights, {name: p.detach() for name, p in alone.named_parameters()})


def test_optimizer_inside_backward_under_fsdp(pool: Any) -> None:
    for found in pool.run(2, trained_in_backward, "aot_eager"):
        assert max(found.values()) < EXACT, found


def compiled_backward(rank: Any, inner: str, is_around: bool, is_sharded: bool) -> dict[str, float]:
    """Errors of two backwards that compiled autograd compiles, alone or together with forward."""
    torch._dynamo.reset()
    captures = torch._dynamo.utils.counters["compiled_autograd"]
    before = captures["captures"]
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    if is_sharded:
        fully_shard(model, mesh=rank.mesh())
    cpcompile.apply(model, rank.mesh(), inner=inner)
    found: dict[str, float] = {}

    def step(inputs: dict[str, Tensor]) -> Tensor:
        loss = loss_of(model(**inputs))
        with contextlib.nullcontext() if is_around else _enable(torch.compile(backend="eager")):
            loss.backward()
        return loss

    with torch._dynamo.config.patch(compiled_autograd=is_around):
        run = torch.compile(step, backend="eager") if is_around else step
        for index in range(2):
            inputs = batch(alone, LENGTH, seed=index)
            losses = [run(inputs), loss_of(alone(**inputs))]
            losses[1].backward()
            found[f"loss {index}"] = error(losses[0].detach(), losses[1].detach())
    assert captures["captures"] > before
    return found | errors(by_name(model), by_name(alone))


@pytest.mark.parametrize(
    ("inner", "is_around", "is_sharded"),
    [
        pytest.param("eager", True, False, marks=pytest.mark.slow),
        pytest.param("aot_eager", False, False, marks=pytest.mark.slow),
        ("aot_eager", True, True),
    ],
)
def test_compiled_autograd(pool: Any, inner: str, is_around: bool, is_sharded: bool) -> None:
    for found in pool.run(2, compiled_backward, inner, is_around, is_sharded):
        assert max(found.values()) < EXACT, found
