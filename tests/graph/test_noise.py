"""Noise for tokens is drawn by their places, the same on any number of ranks, or as one device draws it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers.integrations.neftune import neftune_post_forward_hook

from cpcompile import CPError, VerificationError, verify
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.inspect.model_runs import LockstepBackend, seeded
from cpcompile.ir.annotation import placement_of
from cpcompile.ir.placement import Sharded
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes import place_tokens, rewrite_dropout
from cpcompile.runtime.tokens.noise import noise_at
from tests.graph.small_models import TinyLM, batch, before, count, planned

cp = torch.ops.cpcompile
LENGTH = 13


class Noisy(TinyLM):
    """Adds noise to the embedded tokens, and to a parameter."""

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.noise(self.embedding(input_ids))
        return self.head(x + self.attend(x))


def neftune(x: Tensor) -> Tensor:
    """Noise of embeddings (Jain et al.: NEFTune, 2023)."""
    return x + torch.zeros_like(x).uniform_(-1, 1) * 5 / math.sqrt(x.shape[1] * x.shape[2])


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "neftune": neftune,
    "rand_like": lambda x: x * torch.rand_like(x),
    "randn_like": lambda x: x + torch.randn_like(x) * 0.3,
    "normal": lambda x: x + torch.empty_like(x).normal_(1.0, 0.5),
    "bernoulli": lambda x: x * torch.empty_like(x).bernoulli_(0.7),
    "beside dropout": lambda x: F.dropout(neftune(F.dropout(x, 0.2)), 0.3) + torch.randn_like(x),
    "of a range": lambda x: F.pad(x[:, 1:] * torch.rand_like(x[:, 1:]), (0, 0, 0, 1)),
    "of merged dims": lambda x: (x.flatten(0, 1) + torch.rand_like(x.flatten(0, 1))).view(x.shape),
    "of another layout": lambda x: x + torch.randn_like(x.transpose(1, 2)).transpose(1, 2),
    "of a whole value": lambda x: x + torch.rand_like(x.new_ones(8)),
    "drop path": lambda x: x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("world_size", "balancer"), [(1, "contiguous"), (2, "zig_zag"), (3, "contiguous"), (4, "zig_zag")]
)
def test_exact_draws_are_those_of_one_device(kind: str, world_size: int, balancer: str) -> None:
    found = verify(
        Noisy(KINDS[kind]),
        batch(LENGTH),
        world_size=world_size,
        dtype=torch.float64,
        balancer=balancer,
        exact_dropout=True,
    )
    assert found.ok, found


def llama_with_noise() -> torch.nn.Module:
    """Return a Llama under the hook of transformers, which reads the size of the noise from a tensor."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, use_cache=False, **sizes))
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    return model.train()


def test_neftune_of_transformers() -> None:
    ids = torch.randint(64, (2, 29))
    inputs = {"input_ids": ids, "labels": ids}
    found = verify(llama_with_noise(), inputs, world_size=4, dtype=torch.float64, dynamic=False, exact_dropout=True)
    assert found.ok, found
    with pytest.raises(CPError, match=r"neftune.py(.*\n)*.*dynamic=False traces it"):
        verify(llama_with_noise(), inputs, world_size=4, exact_dropout=True)


def test_verify_refuses_noise_that_is_drawn_by_place() -> None:
    with pytest.raises(VerificationError, match=r"random numbers are drawn for tokens(.*\n)*.*exact_dropout=True"):
        verify(Noisy(neftune), batch(LENGTH), world_size=2)


class Returned(Noisy):
    """Returns what the noise is added to nothing of, so that only the noise is seen."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return self.noise(self.embedding(input_ids) * 0)


def drawn(noise: Callable[[Tensor], Tensor], world_size: int, balancer: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the noise of all tokens, as the ranks draw it."""
    monkeypatch.setattr("cpcompile.inspect.model_runs.refuse_noise", lambda gm: None)
    torch._dynamo.reset()
    model = Returned(noise)
    config = Config(outputs="full", balancer=balancer)
    backend = LockstepBackend(config, Axis.in_process(world_size), is_wide=False)
    with seeded(model):
        out: Tensor = compile_whole(model.forward, backend, config)(
            **by_name(model.forward, {"input_ids": batch(LENGTH)["input_ids"]})
        )
    return out.detach()


@pytest.mark.parametrize("kind", ["neftune", "randn_like"])
def test_the_same_numbers_on_any_number_of_ranks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = drawn(KINDS[kind], 2, "contiguous", monkeypatch)
    assert len(first.unique()) > 0.9 * first.numel(), "no two tokens have the same"
    for world_size, balancer in ((3, "zig_zag"), (4, "contiguous")):
        assert torch.equal(first, drawn(KINDS[kind], world_size, balancer, monkeypatch))


def test_writes_one_operator_for_each_place() -> None:
    model = Noisy(lambda x: F.dropout(neftune(x), 0.1) + torch.rand_like(x))
    transformed = planned(model, batch())
    gm = before(transformed, place_tokens)
    assert rewrite_dropout(gm, plan=transformed.plan) == 3
    assert count(gm, cp.shared_seed.default) == 1
    nodes = gm.graph.find_nodes(op="call_function", target=cp.noise_tokens.default)
    assert [node.args[2:8] for node in nodes] == [(0, "uniform", -1.0, 1.0, 1, 1), (2, "uniform", 0.0, 1.0, 1, 1)]
    assert all(placement_of(node) == Sharded(1) for node in nodes)
    assert rewrite_dropout(gm, plan=transformed.plan) == 0


N = 1 << 18


@pytest.mark.parametrize("settings", [("uniform", -1.0, 3.0), ("normal", 1.0, 2.0), ("bernoulli", 0.3, 1.0)])
def test_distribution(settings: Any) -> None:
    kind, a, b = settings
    x = noise_at(torch.tensor(7), 3, torch.arange(N), *settings)
    if kind == "bernoulli":
        mean, deviation = a, math.sqrt(a * (1 - a))
    else:
        mean, deviation = {"uniform": ((a + b) / 2, (b - a) / math.sqrt(12)), "normal": (a, b)}[kind]
    assert abs(x.mean().item() - mean) < 5 * deviation / math.sqrt(N)
    assert abs(x.std().item() / deviation - 1) < 0.01
    for shift in (1, 2, 64, N // 2):
        assert abs(((x - mean) * (x.roll(shift) - mean)).mean().item()) < 5 * deviation**2 / math.sqrt(N)
    if kind == "normal":
        inside = ((x - a).abs() < b).double().mean().item()
        assert abs(inside - 0.6827) < 0.005
    if kind == "uniform":
        assert a <= x.min().item() and x.max().item() < b
    assert not torch.equal(x, noise_at(torch.tensor(8), 3, torch.arange(N), *settings))
    assert not torch.equal(x, noise_at(torch.tensor(7), 4, torch.arange(N), *settings))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operators_are_legal(dtype: torch.dtype) -> None:
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(3, 8, 6, dtype=dtype)
    axis = (1, 1, 8, "zig_zag", 1, "")
    torch.library.opcheck(cp.noise_tokens.default, (x, torch.tensor(5), 0, "normal", 0.0, 1.0, *axis), test_utils=tests)
    drawing = (x, None, "uniform", 0.0, 1.0, [0, 1, 2], 1, 1, 0, 0, 8, "zig_zag", 1, "")
    torch.library.opcheck(cp.draw_noise.default, drawing, test_utils=tests)
