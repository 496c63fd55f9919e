"""What people do with gradients, on gloo ranks against one device: accumulate, clip, step, penalise, average over replicas."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import cpcompile
from cpcompile.runtime.parameters import gradient_sums as gradients_of_ranks
from cpcompile.runtime.parameters.gradient_sums import GradientSums
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64
ONE_LAYER = {"num_layers": 1}


def new(rank: Any, name: str = "rotary", **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return (a context-parallel model, an untouched one with the same weights), with nothing compiled yet."""
    torch._dynamo.reset()
    model, alone = make(name, **ONE_LAYER), make(name, **ONE_LAYER)
    return cpcompile.apply(model, rank.mesh(), **{"inner": "eager"} | options), alone


def assert_exact(results: list[dict[str, float]], tolerance: float = EXACT) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < tolerance, f"rank {rank}: {name} is off by {found[name]:.1e}"


def accumulated(rank: Any, is_held_back: bool) -> dict[str, float]:
    """Errors after three micro-batches of unequal lengths; `no_sync` delivers with the last one only."""
    model, alone = new(rank)
    found = {}
    for repeat in range(2):  # what is held back must not leak into the next step
        for index, length in enumerate((31, 64, 31)):
            inputs = batch(alone, length, seed=3 * repeat + index)
            is_last = index == 2
            with contextlib.nullcontext() if is_last or not is_held_back else cpcompile.no_sync(model):
                loss_of(model(**inputs)).backward()
            loss_of(alone(**inputs)).backward()
            if is_held_back and not is_last:
                assert all(p.grad is None for p in model.parameters())
        found |= {f"{name} {repeat}": x for name, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize("is_held_back", [False, True])
def test_accumulation_over_micro_batches(pool: Any, is_held_back: bool) -> None:
    assert_exact(pool.run(2, accumulated, is_held_back))


def trained(rank: Any, name: str, inner: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Errors of the parameters after clipped optimizer steps, and the parameters."""
    model, alone = new(rank, name, inner=inner)
    found = {}
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, alone)]
    for seed, length in enumerate((31, 64, 33)):
        inputs, norms = batch(alone, length, seed=seed), []
        for module, optimizer in zip((model, alone), optimizers, strict=True):
            loss_of(module(**inputs)).backward()
            norms.append(nn.utils.clip_grad_norm_(module.parameters(), 0.1))
            optimizer.step()
            optimizer.zero_grad()
        assert norms[1] > 0.1, "clipping is at work"
        found[f"norm {seed}"] = error(norms[0], norms[1])
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found | errors(weights, {n: p.detach() for n, p in alone.named_parameters()}), weights


@pytest.mark.parametrize(("name", "inner"), [("rotary", "eager"), ("nanogpt", "aot_eager")])
def test_optimizer_steps(pool: Any, name: str, inner: str) -> None:
    results = pool.run(3, trained, name, inner)
    # Adam divides by the root of the squared gradient, so rounding of tiny gradients comes out enlarged.
    assert_exact([found for found, _ in results], 1e-8)
    for _, weights in results[1:]:
        assert all(torch.equal(x, results[0][1][n]) for n, x in weights.items()), "the ranks drift apart"


def penalised(rank: Any) -> dict[str, float]:
    """Errors where the loss also has a term of the parameters, which every rank computes whole."""
    model, alone = new(rank)
    inputs = batch(alone, 31)
    for module in (model, alone):
        (loss_of(module(**inputs)) + 0.1 * sum(p.pow(2).sum() for p in module.parameters())).backward()
    return errors(gradients(model), gradients(alone))


def test_a_penalty_outside_the_model_counts_once(pool: Any) -> None:
    assert_exact(pool.run(3, penalised))


def asked_for(rank: Any) -> dict[str, float]:
    """Errors of `torch.autograd.grad`, for all parameters and for one."""
    model, alone = new(rank)
    inputs, found = batch(alone, 31), {}
    names = [name for name, _ in alone.named_parameters()]
    for wanted in (names, ["head.weight"]):
        results = []
        for module in (model, alone):
            parameters = [module.get_parameter(name) for name in wanted]
            results.append(dict(zip(wanted, torch.autograd.grad(loss_of(module(**inputs)), parameters), strict=True)))
        found |= {f"{name} of {len(wanted)}": x for name, x in errors(*results).items()}
    return found


def test_autograd_grad(pool: Any) -> None:
    assert_exact(pool.run(2, asked_for))


def two_losses(rank: Any) -> dict[str, float]:
    """Errors of one backward through two calls of the model."""
    model, alone = new(rank, "nanogpt")
    for module in (model, alone):
        losses = [loss_of(module(**batch(alone, length, seed=length))) for length in (31, 40)]
        (losses[0] * losses[1]).backward()
    return errors(gradients(model), gradients(alone))


def test_one_backward_through_two_calls(pool: Any) -> None:
    assert_exact(pool.run(2, two_losses))


def averaged(rank: Any, num_replicas: int, strategy: str) -> dict[str, float]:
    """Errors with `grad_sync="mean"` inside DDP over replicas x ranks, each replica with a batch of its own."""
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", (num_replicas, rank.world_size // num_replicas), mesh_dim_names=("dp", "cp"))
    model, alone = make("rotary", **ONE_LAYER), make("rotary", **ONE_LAYER)
    cpcompile.apply(model, mesh, axis="cp", grad_sync="mean", strategy=strategy, inner="eager")
    # Small buckets: DDP must not let Dynamo cut the model into a graph for each.
    ddp = DistributedDataParallel(model, process_group=rank.process_group, bucket_cap_mb=0.01)
    found = {}
    for repeat, length in enumerate((31, 64)):
        batches = [batch(alone, length, seed=10 * repeat + replica) for replica in range(num_replicas)]
        with ddp.no_sync() if repeat == 0 else contextlib.nullcontext():
            loss = loss_of(ddp(**batches[mesh.get_local_rank("dp")]))
            loss.backward()
        losses = [loss_of(alone(**inputs)) for inputs in batches]
        (sum(losses) / num_replicas).backward()
        found[f"loss {repeat}"] = error(loss.detach(), losses[mesh.get_local_rank("dp")].detach())
    return found | errors(gradients(model), gradients(alone))


@pytest.mark.parametrize(("num_replicas", "strategy"), [(1, "ring"), (2, "ulysses")])
def test_mean_inside_data_parallel(pool: Any, num_replicas: int, strategy: str) -> None:
    assert_exact(pool.run(4, averaged, num_replicas, strategy))


def left_to_the_caller(rank: Any) -> dict[str, float]:
    model, alone = new(rank, grad_sync="none")
    inputs = batch(alone, 31)
    for module in (model, alone):
        loss_of(module(**inputs)).backward()
    found, expected = gradients(model), gradients(alone)
    assert max(errors(found, expected).values()) > 0.01, "each rank has its own part"
    for grad in found.values():
        torch.distributed.all_reduce(grad, group=rank.process_group)
    return errors(found, expected)


def test_none_leaves_the_sum_to_the_caller(pool: Any) -> None:
    assert_exact(pool.run(2, left_to_the_caller))


def labelled(rank: Any, name: str, layout: str) -> dict[str, float]:
    """Errors with labels that are ignored unequally, on all of a rank's tokens, and everywhere."""
    model, alone = new(rank, name, balancer=layout)
    ignored, key, found = (-1, "targets", {}) if name == "nanogpt" else (-100, "labels", {})
    for kind, keep in {"few": slice(3, 9), "one": slice(-1, None), "none": slice(0, 0)}.items():
        inputs = batch(alone, 64)
        labels = torch.full_like(inputs[key], ignored)
        labels[:, keep] = inputs[key][:, keep].clamp(min=0)
        for module in (model, alone):
            loss = loss_of(module(**inputs | {key: labels}))
            loss.backward()
            found[kind, module is model] = loss.detach(), gradients(module)
    assert found["none", False][0].isnan()
    return {
        f"{kind} {name}": x
        for kind in ("few", "one", "none")
        for (loss, grads), (expected, expected_grads) in [(found[kind, True], found[kind, False])]
        for name, x in ({"loss": error(loss, expected)} | errors(grads, expected_grads)).items()
    }


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("name", ["rotary", "nanogpt"])
def test_ranks_without_labels(pool: Any, name: str, layout: str) -> None:
    assert_exact(pool.run(4, labelled, name, layout))


def in_buckets(rank: Any, bucket_bytes: int) -> tuple[dict[str, float], int]:
    """Errors, and how many messages the sums were."""
    model = new(rank)[0]
    model.norm.float()
    sums = GradientSums()
    sums.group = rank.process_group
    keys = [p.detach().clone() for p in model.parameters()]
    grads = [torch.randn(p.shape, dtype=p.dtype) for p in keys]
    with pytest.MonkeyPatch.context() as patched:
        messages, send = [], gradients_of_ranks.all_reduce_together
        patched.setattr(gradients_of_ranks, "BUCKET_BYTES", bucket_bytes)
        patched.setattr(
            gradients_of_ranks, "all_reduce_together", lambda x, group: [messages.append(x), send(x, group)][1]
        )
        summed = sums.finish([*keys, keys[0]], [*(sums.start(x, None) for x in grads), None])
    assert summed.pop() is None
    assert all(x.dtype == y.dtype and x.is_contiguous() for x, y in zip(summed, grads, strict=True))
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in summed), "no gradient keeps a bucket"
    whole = [torch.zeros_like(x) for x in grads]
    for total, x in zip(whole, grads, strict=True):
        total.copy_(x)
        torch.distributed.all_reduce(total, group=rank.process_group)
    pairs = zip(summed, whole, strict=True)
    return {f"{i}": error(x, y) for i, (x, y) in enumerate(pairs)}, len(messages)


@pytest.mark.parametrize(("bucket_bytes", "num_messages"), [(1, 16), (1 << 20, 2)])
def test_buckets(pool: Any, bucket_bytes: int, num_messages: int) -> None:
    """A bucket has one dtype: the norms in float32 stand between others in float64."""
    results = pool.run(2, in_buckets, bucket_bytes)
    assert_exact([found for found, _ in results], 1e-6)  # a norm is float32
    assert [count for _, count in results] == [num_messages] * 2


def overlapped(rank: Any, inner: str) -> tuple[dict[str, float], list[str]]:
    """Errors, and the order of what backward sends: keys and values, sums of gradients."""
    torch._dynamo.reset()
    model, alone = make("rotary", num_layers=3), make("rotary", num_layers=3)
    cpcompile.apply(model, rank.mesh(), inner=inner, strategy="ring")
    inputs, events = batch(alone, 31), list[str]()
    loss_of(alone(**inputs)).backward()
    send, exchange = gradients_of_ranks.all_reduce_together, torch.distributed.batch_isend_irecv

    def told(name: str, send: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return send(*args, **kwargs)

        return run

    loss = loss_of(model(**inputs))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients_of_ranks, "BUCKET_BYTES", 1)
        patched.setattr(gradients_of_ranks, "all_reduce_together", told("sum", send))
        patched.setattr(torch.distributed, "batch_isend_irecv", told("keys", exchange))
        loss.backward()
    return errors(gradients(model), gradients(alone)), events


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_sums_travel_during_backward(pool: Any, inner: str) -> None:
    for found, events in pool.run(2, overlapped, inner):
        assert max(found.values()) < EXACT, found
        last = len(events) - events[::-1].index("keys")
        assert events[:last].count("sum") > events.count("sum") / 2, "most sums began before the last ring"


def bucketed(rank: Any) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gradients_of_ranks, "BUCKET_BYTES", 3000)
        model, alone = new(rank)
        for module in (model, alone):
            loss_of(module(**batch(alone, 31))).backward()
        return errors(gradients(model), gradients(alone))


def test_training_in_small_buckets(pool: Any) -> None:
    assert_exact(pool.run(2, bucketed))
