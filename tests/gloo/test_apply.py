"""`cpcompile.apply` on gloo ranks against the untouched model on one device: loss, every gradient, outputs, and what stays.

A job runs the untouched model beside the context-parallel one in each rank and returns relative errors.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cpcompile
from tests.models import VOCABULARY, batch, error, errors, gradients, logits_of, loss_of, make

EXACT = 1e-12  # float64
FLOAT32 = 2e-5  # the transformers models cast to float32 themselves, even in float64: rounding, times the depth
LENGTHS = (31, 64, 97)
STRATEGIES, LAYOUTS = ("ulysses", "ring", "gather"), ("contiguous", "zig_zag")


def new(rank: Any, name: str, changes: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Return (a context-parallel model, an untouched one with the same weights), with nothing compiled yet."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, alone = make(name, **changes or {}), make(name, **changes or {})
    return cpcompile.apply(model, rank.mesh(), **{"inner": "eager"} | options), alone


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss and every gradient."""
    loss = loss_of(model(**inputs))
    loss.backward()
    return loss.detach(), gradients(model)


def compare(model: nn.Module, alone: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
    """Return the errors of the loss and of every gradient."""
    (loss, grads), (expected, expected_grads) = step(model, inputs), step(alone, inputs)
    return {"loss": error(loss, expected)} | errors(grads, expected_grads)


def assert_exact(results: list[dict[str, float]], tolerance: float = EXACT) -> None:
    for rank, found in enumerate(results):
        name = max(found, key=found.__getitem__)
        assert found[name] < tolerance, f"rank {rank}: {name} is off by {found[name]:.1e}"


def train_at_lengths(rank: Any, name: str, changes: dict[str, Any], options: dict[str, Any]) -> Any:
    model, alone = new(rank, name, changes, **options)
    found = [compare(model, alone, batch(alone, length)) for length in LENGTHS]
    return {
        f"{key} at {n}": x for n, result in zip(LENGTHS, found, strict=True) for key, x in result.items()
    }, num_graphs()


def check_lengths(
    pool: Any,
    world_size: int,
    name: str,
    changes: dict[str, Any],
    tolerance: float = EXACT,
    *,
    graphs: int = 1,
    **options: Any,
) -> None:
    results = pool.run(world_size, train_at_lengths, name, changes, options, timeout=200)
    assert_exact([found for found, _ in results], tolerance)
    assert all(count <= graphs for _, count in results), "one graph serves all lengths"


@pytest.mark.parametrize(
    ("world_size", "layout", "inner"),
    [
        (2, "zig_zag", "eager"),
        (3, "contiguous", "eager"),
        (2, "zig_zag", "aot_eager"),
        pytest.param(2, "contiguous", "inductor", marks=pytest.mark.slow),
    ],
)
def test_operators_along_the_tokens(pool: Any, world_size: int, layout: str, inner: str) -> None:
    # Inductor compiles the gradient of a convolution for each length, on one device too.
    graphs = len(LENGTHS) if inner == "inductor" else 1
    check_lengths(pool, world_size, "mixer", {}, graphs=graphs, balancer=layout, inner=inner)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_exactly(pool: Any, strategy: str, layout: str, world_size: int) -> None:
    check_lengths(pool, world_size, "rotary", {"num_layers": 1}, strategy=strategy, balancer=layout)


@pytest.mark.parametrize(
    ("world_size", "strategy"), [(1, "auto"), (4, "auto"), pytest.param(4, "ring", marks=pytest.mark.slow)]
)
def test_trains_exactly_on_one_and_on_four(pool: Any, strategy: str, world_size: int) -> None:
    check_lengths(pool, world_size, "nanogpt", {"num_layers": 1}, strategy=strategy, balancer="zig_zag")


@pytest.mark.parametrize(
    ("name", "strategy", "layout", "world_size"),
    [
        ("llama", "ring", "zig_zag", 2),
        pytest.param("qwen3", "gather", "zig_zag", 3, marks=pytest.mark.slow),
        ("gpt2", "ulysses", "contiguous", 2),
        ("gemma2", "ring", "contiguous", 3),
    ],
)
def test_transformers_train_exactly(pool: Any, name: str, strategy: str, layout: str, world_size: int) -> None:
    check_lengths(pool, world_size, name, {}, FLOAT32, strategy=strategy, balancer=layout)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_transformers_train_exactly_all(pool: Any, name: str, strategy: str, layout: str, world_size: int) -> None:
    check_lengths(pool, world_size, name, {}, FLOAT32, strategy=strategy, balancer=layout)


@pytest.mark.parametrize(
    "strategy", ["ulysses", *(pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES if s != "ulysses")]
)
def test_ahead_of_time_autograd(pool: Any, strategy: str) -> None:
    check_lengths(pool, 2, "rotary", {"num_layers": 1}, strategy=strategy, balancer="zig_zag", inner="aot_eager")


@pytest.mark.always
@pytest.mark.parametrize(
    "strategy", ["ring", *(pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES if s != "ring")]
)
def test_inductor(pool: Any, strategy: str) -> None:
    check_lengths(pool, 2, "rotary", {"num_layers": 1}, strategy=strategy, balancer="zig_zag", inner="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inductor_all(pool: Any, strategy: str, name: str) -> None:
    check_lengths(pool, 3, name, {}, FLOAT32, strategy=strategy, balancer="zig_zag", inner="inductor")


def look_around(rank: Any) -> None:
    """The assertions about what stays; a rank that raises fails the test."""
    model, alone = make("llama", num_layers=1), make("llama", num_layers=1)
    parameters, before = dict(model.named_parameters()), type(model)
    applied = cpcompile.apply(model, rank.mesh(), inner="eager")
    assert applied is model and type(model) is before
    assert list(model.state_dict()) == list(alone.state_dict())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert inspect.signature(model.forward) == inspect.signature(alone.forward)
    inputs = batch(alone, 31)
    output, expected = model(**inputs), alone(**inputs)
    assert type(output) is type(expected) and list(output) == list(expected)
    assert torch.allclose(output.loss, expected.loss, rtol=FLOAT32, atol=0)
    positional = model(inputs["input_ids"], labels=inputs["labels"])
    assert torch.equal(positional.loss, output.loss)
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], output.loss)
    with pytest.raises(cpcompile.ConfigError, match=r"already: call cpcompile\.remove"):
        cpcompile.apply(model, rank.mesh())
    model.load_state_dict(alone.state_dict())
    assert cpcompile.remove(model) is model
    assert "forward" not in model.__dict__ and model.forward.__func__ is before.forward
    assert torch.equal(model(**inputs).logits, expected.logits)
    for function in (cpcompile.remove, cpcompile.no_sync):
        with pytest.raises(cpcompile.ConfigError, match="is not context parallel"):
            function(model)
    cpcompile.apply(model, rank.mesh(), inner="eager")
    assert torch.allclose(model(**inputs).loss, expected.loss, rtol=FLOAT32, atol=0)


def test_same_object_names_signature_and_output(pool: Any) -> None:
    pool.run(2, look_around)


def outputs(rank: Any, layout: str, length: int) -> dict[str, float]:
    """Errors of: logits joined by `unshard`, logits with outputs="full", and gradients of a loss on either."""
    found = {}
    for kind in ("local", "full"):
        model, alone = new(rank, "rotary", {"num_layers": 1}, balancer=layout, outputs=kind)
        inputs = batch(alone, length)
        weights = torch.randn(2, length, VOCABULARY, generator=torch.Generator().manual_seed(1)).double()
        local = model(**inputs)["logits"]
        logits = cpcompile.unshard(local, model) if kind == "local" else local
        assert kind == "full" or local.shape[1] < length
        expected = alone(**inputs)["logits"]
        found[f"{kind} logits"] = error(logits, expected)
        (logits * weights).sum().backward()
        (expected * weights).sum().backward()
        found |= {f"{kind} {name}": x for name, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize(
    ("layout", "length"), [("contiguous", 31), pytest.param("zig_zag", 64, marks=pytest.mark.slow)]
)
def test_logits_are_local_or_whole(pool: Any, layout: str, length: int) -> None:
    assert_exact(pool.run(3, outputs, layout, length))


def lengths_that_would_choose_differently(rank: Any) -> dict[str, float]:
    from unittest import mock

    from cpcompile.compile import transform

    model, alone = new(rank, "rotary", {"num_layers": 1}, dynamic=False, strategy="ring")
    free, choices = transform.choose, iter(("zig_zag", "contiguous"))

    def choose(sites: Any, strategy: str, balancer: str, ranks: Any, **options: Any) -> Any:
        return free(sites, strategy, next(choices) if balancer == "auto" else balancer, ranks, **options)

    with mock.patch.object(transform, "choose", choose):
        found = {}
        for length in (32, 48, 32):  # the last runs the first graph again
            inputs = batch(alone, length)
            whole = cpcompile.unshard(logits_of(model(**inputs)), model)
            found[f"logits of {length}"] = error(whole, logits_of(alone(**inputs)))
    return found


def test_one_layout_for_all_graphs_of_a_model(pool: Any) -> None:
    assert_exact(pool.run(2, lengths_that_would_choose_differently))


def own_loss(rank: Any, length: int) -> dict[str, float]:
    """Errors of a loss outside the model, as the docstring of `shard` says it."""
    model, alone = new(rank, "nanogpt", {"num_layers": 1}, balancer="zig_zag")
    inputs = batch(alone, length)
    targets = inputs.pop("targets")
    logits, _ = model(**inputs)
    mine = cpcompile.shard(targets, model, padding=-1)
    total = F.cross_entropy(logits.flatten(0, 1), mine.flatten(), ignore_index=-1, reduction="sum")
    loss = total / (targets != -1).sum()
    loss.backward()
    expected, _ = alone(**inputs)
    whole = F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=-1)
    whole.backward()
    torch.distributed.all_reduce(loss.detach(), group=rank.process_group)
    return {"loss": error(loss.detach(), whole.detach())} | errors(gradients(model), gradients(alone))


@pytest.mark.parametrize(
    "length", [25, 31, pytest.param(64, marks=pytest.mark.slow)]
)  # 25: all slots of a chunk are padding
def test_a_loss_on_local_logits(pool: Any, length: int) -> None:
    assert_exact(pool.run(3, own_loss, length))


def evaluate(rank: Any) -> dict[str, float]:
    model, alone = new(rank, "rotary", {"num_layers": 1}, outputs="full")
    found = {}
    for length in (31, 64):
        inputs = batch(alone, length)
        compare(model, alone, inputs)
        for name, context in (("no_grad", torch.no_grad), ("inference", torch.inference_mode)):
            with context():
                output, expected = model.eval()(**inputs), alone.eval()(**inputs)
            assert not output["loss"].requires_grad and not output["logits"].requires_grad
            found |= {f"{name} {key} at {length}": error(output[key], expected[key]) for key in expected}
        found |= compare(model.train(), alone.train(), inputs)
    return found


def test_evaluation_between_training_steps(pool: Any) -> None:
    assert_exact(pool.run(2, evaluate))


def checkpointed(rank: Any, inner: str) -> dict[str, float]:
    model, alone = new(rank, "llama", {"num_layers": 1}, inner=inner)
    for module in (model, alone):
        module.gradient_checkpointing_enable()
    return compare(model, alone, batch(alone, 31))


@pytest.mark.parametrize("inner", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
def test_activation_checkpointing(pool: Any, inner: str) -> None:
    assert_exact(pool.run(2, checkpointed, inner), FLOAT32)


def half(rank: Any) -> tuple[float, float]:
    """Return the largest error under autocast, and that of one device under autocast, both against float32."""
    model, alone = new(rank, "llama", {"num_layers": 1}, strategy="ring")
    model.float(), alone.float()
    inputs = batch(alone, 64)
    loss, exact = step(alone, inputs)
    worst = []
    for module in (model, alone):
        with torch.autocast("cpu", torch.bfloat16):
            own_loss, grads = step(module, inputs)
        worst.append(max(error(own_loss, loss), *errors(grads, exact).values()))
    return worst[0], worst[1]


def test_autocast_rounds_no_worse_than_one_device(pool: Any) -> None:
    for found, alone in pool.run(2, half):
        assert 0 < found < 1.5 * alone


def frozen(rank: Any) -> dict[str, float]:
    model, alone = new(rank, "rotary", {"num_layers": 1})
    for module in (model, alone):
        module.embed.requires_grad_(False)
        module.blocks[0].qkv.requires_grad_(False)
    inputs = batch(alone, 31)
    found = compare(model, alone, inputs)
    loss_of(model(**inputs)).backward()
    assert model.embed.weight.grad is None and model.head.weight.grad is not None
    return found


def test_frozen_parameters_stay_without_gradient(pool: Any) -> None:
    assert_exact(pool.run(2, frozen))


def embedded(rank: Any) -> dict[str, float]:
    """Errors where the user embeds outside the model: inputs that are no parameters get the full gradient too."""
    model, alone = new(rank, "rotary", {"num_layers": 1})
    found = {}
    for length in (31, 64):
        inputs = batch(alone, length)
        labels, results = inputs["labels"], []
        for module in (model, alone):
            x = module.embed(inputs["input_ids"])
            x.retain_grad()
            loss_of(module(inputs_embeds=x, labels=labels)).backward()
            results.append({"x": x.grad} | gradients(module))
        found |= errors(*results)
    return found


def test_embedded_inputs_get_the_full_gradient(pool: Any) -> None:
    assert_exact(pool.run(3, embedded))


def copied(rank: Any) -> dict[str, float]:
    model, alone = new(rank, "rotary", {"num_layers": 1})
    inputs = batch(alone, 31)
    compare(model, alone, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in (model, alone):
            module.head.weight.mul_(2)
    found = compare(model, alone, inputs)
    with torch.no_grad():
        alone.head.weight.div_(2)
    step(twin, inputs)
    assert all(p.grad is None for p in model.parameters())
    found |= {f"copy {name}": x for name, x in compare(twin, alone, inputs).items()}
    with pytest.raises(cpcompile.ConfigError, match=r"cannot be pickled.*state_dict"):
        pickle.dumps(model)
    assert pickle.loads(pickle.dumps(cpcompile.remove(twin))) is not None
    return found


def test_a_copy_is_a_model_of_its_own(pool: Any) -> None:
    assert_exact(pool.run(2, copied))


def replaced(rank: Any) -> None:
    model = make("rotary", num_layers=1)
    calls, forward = [], model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    model.forward = counted
    cpcompile.remove(cpcompile.apply(model, rank.mesh()))
    assert model.forward is counted


def test_remove_restores_what_another_library_had_put_in_place(pool: Any) -> None:
    pool.run(1, replaced)
