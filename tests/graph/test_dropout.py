"""Dropout sites become operators whose random numbers do not depend on the rank, or draw what one device draws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cpcompile import NoRule, explain, verify
from cpcompile.capture.dynamo import by_name, compile_whole
from cpcompile.inspect import model_runs
from cpcompile.inspect.definitions import COLLECTIVES
from cpcompile.inspect.model_runs import LockstepBackend, default_objective, run_and_differentiate
from cpcompile.ir.annotation import annotation, placement_of
from cpcompile.ir.operator_call import Call
from cpcompile.ir.placement import FULL, Sharded
from cpcompile.options.config import Config
from cpcompile.options.mesh import Axis
from cpcompile.passes import place_tokens, rewrite_dropout
from cpcompile.runtime.tokens.dropout import splitmix64
from tests.graph.small_models import TinyLM, batch, before, count, planned
from tests.models import batch as batch_of
from tests.models import make

aten, cp = torch.ops.aten, torch.ops.cpcompile
WHOLE = (-1, 1, 1, "contiguous", 1, "")


class Dropping(TinyLM):
    """Applies a function to the embedded tokens and one to a parameter."""

    def __init__(
        self,
        of_tokens: Callable[[Tensor], Tensor] = lambda x: F.dropout(x, 0.3),
        of_whole: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.of_tokens, self.of_whole = of_tokens, of_whole

    def logits(self, input_ids: Tensor) -> Tensor:
        x = self.of_tokens(self.embedding(input_ids))
        return self.head(x + self.attend(x)) + self.of_whole(self.head.bias)


def test_rewrites_each_dropout_to_one_operator_of_one_seed() -> None:
    transformed = planned(Dropping(lambda x: F.dropout(F.dropout(x, 0.1), 0.2), F.dropout), batch())
    gm = before(transformed, place_tokens)
    assert rewrite_dropout(gm, plan=transformed.plan) == 3
    assert count(gm, cp.shared_seed.default) == 1
    first, second, third = gm.graph.find_nodes(op="call_function", target=cp.dropout_tokens.default)
    assert [node.args[2:6] for node in (first, second, third)] == [(0, 0.1, 1, 1), (1, 0.2, 1, 1), (2, 0.5, -1, 1)]
    assert [placement_of(node) for node in (first, second, third)] == [Sharded(1), Sharded(1), FULL]
    assert all(annotation(node).origin for node in (first, second, third))
    assert not count(gm, aten.dropout.default)


def test_exact_dropouts_draw_one_after_the_other() -> None:
    model = Dropping(lambda x: F.dropout(F.dropout(x, 0.1), 0.2), F.dropout)
    transformed = planned(model, batch(), exact_dropout=True)
    gm = before(transformed, place_tokens)
    assert rewrite_dropout(gm, plan=transformed.plan) == 3
    draws = gm.graph.find_nodes(op="call_function", target=cp.draw_kept.default)
    assert [node.args[1] for node in draws] == [None, *draws[:2]]
    assert not count(gm, cp.shared_seed.default)


class DroppingWeights(TinyLM):
    """Drops weights of two attentions, one fused and one written out."""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.3)
        y = y + F.dropout((q @ k.mT / 2).softmax(-1), 0.2) @ v
        return F.dropout(y.transpose(1, 2).flatten(-2), 0.1)


def test_attentions_drop_by_the_shared_seed() -> None:
    transformed = planned(DroppingWeights(), batch(7))
    gm = before(transformed, place_tokens)
    assert rewrite_dropout(gm, plan=transformed.plan) == 3
    (seed,) = gm.graph.find_nodes(op="call_function", target=cp.shared_seed.default)
    calls = [Call.of(node) for node in gm.graph.find_nodes(op="call_function", target=cp.attention.default)]
    assert [(call["dropout"], call["seed"], call["site"]) for call in calls] == [(0.3, seed, 0), (0.2, seed, 1)]
    text = gm.graph.python_code("self").src
    assert rewrite_dropout(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


def test_no_tensor_of_all_weights_is_left() -> None:
    graph = planned(DroppingWeights(), batch(7)).graph.graph
    shapes = [node.meta["val"].shape for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert not [shape for shape in shapes if tuple(shape[-2:]) == (7, 7)]
    assert not count(graph.owning_module, aten.softmax.int)


@pytest.mark.parametrize("length", [pytest.param(8, marks=pytest.mark.slow), 11])
def test_weights_are_dropped_whatever_the_number_of_ranks(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runs, "refuse_dropout", lambda gm: None)
    model, inputs, config = DroppingWeights().double(), batch(length), Config()
    found = []
    for world_size in (1, 2, 3):
        torch._dynamo.reset()
        ranks = LockstepBackend(config, Axis.in_process(world_size), False)
        forward = compile_whole(model.forward, ranks, config)
        for _ in range(2):  # the first time, compilation draws random numbers, too
            torch.manual_seed(1)
            result = run_and_differentiate(model, forward, by_name(model.forward, inputs), default_objective, config)
        found.append(result)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-10, atol=1e-12)


SILENT: dict[str, Callable[[Tensor], Tensor]] = {
    "evaluation": lambda x: F.dropout(x, 0.5, False),
    "rate 0": lambda x: F.dropout(x, 0.0),
    "rate 1": lambda x: F.dropout(x, 1.0),
}


@pytest.mark.parametrize("function", SILENT.values(), ids=SILENT.keys())
def test_leaves_dropout_alone_that_draws_nothing(function: Callable[[Tensor], Tensor]) -> None:
    transformed = planned(Dropping(function, function), batch())
    gm = before(transformed, place_tokens)
    text = gm.graph.python_code("self").src
    assert rewrite_dropout(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


@pytest.mark.parametrize("exact", [False, True])
def test_second_run_changes_nothing(exact: bool) -> None:
    transformed = planned(Dropping(of_whole=F.dropout), batch(), exact_dropout=exact)
    gm = before(transformed, place_tokens, rewrite_dropout)
    text = gm.graph.python_code("self").src
    assert rewrite_dropout(gm, plan=transformed.plan) == 0
    assert gm.graph.python_code("self").src == text


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens": lambda x: F.dropout(x, 0.3),
    "tokens in another order of memory": lambda x: F.dropout(x.permute(2, 0, 1), 0.3).permute(1, 2, 0),
    "merged tokens": lambda x: F.dropout(x.reshape(-1, 8), 0.3).view(x.shape),
    "tokens of heads": lambda x: F.dropout(x.unflatten(-1, (2, 4)).transpose(1, 2), 0.3).transpose(1, 2).flatten(-2),
    "features": lambda x: F.dropout1d(x, 0.3),
    "features of heads": lambda x: F.dropout2d(x.unsqueeze(-1), 0.3).squeeze(-1),
    "everything": lambda x: F.dropout(x, 1.0) + x,
    "nothing": lambda x: F.dropout(x, 0.0) + F.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("layout", ["contiguous", "zig_zag"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_exact_dropout_keeps_numerics(kind: Callable[[Tensor], Tensor], layout: str) -> None:
    options = {"dtype": torch.float64, "exact_dropout": True, "balancer": layout}
    for length, world_size in ((31, 1), (31, 2), (8, 3)):
        result = verify(Dropping(kind, F.dropout), batch(length), world_size=world_size, **options)
        assert result.ok, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_dropout_in_other_precisions(dtype: torch.dtype) -> None:
    verify(Dropping(), batch(31), world_size=2, dtype=dtype, exact_dropout=True).raise_if_wrong()


def test_parts_of_an_exact_dropout_are_not_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_sums(calls: list[dict[str, Any]]) -> list[Tensor]:
        return [call["x"] for call in calls]

    monkeypatch.setitem(COLLECTIVES, cp.all_reduce.default, own_sums)
    found = verify(Dropping(), batch(7), world_size=2, dtype=torch.float64, exact_dropout=True)
    assert found.first_difference is not None
    assert "F.cross_entropy(" in found.first_difference.place


def test_exact_dropout_of_a_range_of_tokens() -> None:
    for layout, world_size in itertools.product(("contiguous", "zig_zag"), (1, 2, 3)):
        model = TinyLM(lambda x, y: F.dropout(x[:, 1:-2], 0.3).square().mean())
        options = {"dtype": torch.float64, "exact_dropout": True, "balancer": layout}
        verify(model, batch(13), world_size=world_size, **options).raise_if_wrong()


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_exact_dropout_of_a_gpt2(world_size: int) -> None:
    model = make("gpt2", resid_pdrop=0.1, embd_pdrop=0.1)
    inputs = batch_of(model, 31)
    verify(model, inputs, world_size=world_size, dtype=torch.float64, exact_dropout=True).raise_if_wrong()


def test_verify_leaves_the_random_numbers_alone() -> None:
    model, inputs = Dropping(), batch()
    state = torch.get_rng_state()
    verify(model, inputs, world_size=2, exact_dropout=True)
    assert torch.equal(torch.get_rng_state(), state)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "rrelu": lambda x: F.rrelu(x, training=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_other_random_numbers_for_local_tokens(name: str) -> None:
    with pytest.raises(NoRule) as error:
        explain(Dropping(REFUSED[name]), batch(), world_size=2)
    assert f"aten.{name}" in str(error.value)
    assert "random numbers for this rank's tokens" in str(error.value)
    assert "test_dropout.py:" in str(error.value)
    assert "use torch.nn.functional.dropout" in str(error.value)


WITHOUT_RULE: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) * x,
    "multinomial": lambda x: x + x.softmax(-1).flatten(0, 1).multinomial(1).view(*x.shape[:2], 1),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, True),
    "exponential": lambda x: x + torch.empty_like(x).exponential_(),
}


@pytest.mark.parametrize("name", WITHOUT_RULE)
def test_refuses_random_operators_by_name(name: str) -> None:
    with pytest.raises(NoRule, match=f"aten.{name}"):
        explain(Dropping(WITHOUT_RULE[name]), batch(), world_size=2)


def test_exact_dropout_refuses_other_random_numbers_for_whole_values() -> None:
    model = Dropping(of_whole=lambda x: x + torch.empty_like(x).exponential_())
    explain(model, batch(), world_size=2)
    with pytest.raises(NoRule, match=r"aten.exponential.default: is no dropout(.*\n)*.*leave exact_dropout off"):
        explain(model, batch(), world_size=2, exact_dropout=True)


def test_splitmix64_is_that_of_its_authors() -> None:
    # The first numbers of Vigna's splitmix64.c from the seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    numbers = splitmix64(torch.tensor(1234567), torch.arange(4))
    assert [number % 2**64 for number in numbers.tolist()] == expected


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# opcheck of torch 2.14 reads the .grad of tensors that are not leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [WHOLE, (1, 1, 8, "zig_zag", 1, ""), (2, 1, 6, "contiguous", 1, "")])
def test_operator_is_legal(where: tuple[Any, ...], dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, 6, dtype=dtype).transpose(0, 0).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(cp.dropout_tokens.default, (x, torch.tensor(5), 0, 0.4, *where), test_utils=tests)


def test_drawing_operators_are_legal() -> None:
    tests = ("test_schema", "test_faketensor")
    x = torch.randn(3, 8, 6)
    settings = (False, 0.4, [0, 1, 2], 1, 1, 0, 0, 8, "zig_zag", 1, "")
    torch.library.opcheck(cp.draw_kept.default, (x, None, *settings), test_utils=tests)
    torch.library.opcheck(cp.shared_seed.default, (torch.device("cpu"), 1, ""), test_utils=tests)


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (70000,), (3, 70000), (70000, 3)])
def test_all_shapes(shape: tuple[int, ...]) -> None:
    out = drop(torch.ones(shape, dtype=torch.float64), p=0.25)
    flat = drop(torch.ones(math.prod(shape), dtype=torch.float64), p=0.25)
    assert torch.equal(out.flatten(), flat), "an element is dropped by its place alone"
    assert set(out.unique().tolist()) <= {0.0, 1 / 0.75}


def drop(x: Tensor, seed: int = 1, site: int = 0, p: float = 0.5) -> Tensor:
    out: Tensor = cp.dropout_tokens(x, torch.tensor(seed), site, p, *WHOLE)
    return out


N = 1 << 18


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_keeps_as_many_as_the_rate_says(p: float) -> None:
    for seed, site in itertools.product((-(1 << 63), -1, 0, 1, 12345678901234567), (0, 1, 77)):
        out = drop(torch.ones(N, dtype=torch.float64), seed, site, p)
        deviation = math.sqrt(N * p * (1 - p))
        assert abs((out != 0).sum().item() - N * (1 - p)) < 5 * deviation
        assert out.mean().item() == pytest.approx(1, abs=5 * deviation / N / (1 - p))


def correlation(a: Tensor, b: Tensor) -> float:
    return ((a - 0.5) * (b - 0.5)).mean().item() / 0.25


def test_elements_tokens_sites_and_seeds_are_independent() -> None:
    def kept(seed: int = 1, site: int = 0) -> Tensor:
        return (drop(torch.ones(1024, 256, dtype=torch.float64), seed, site) != 0).double()

    bound, x = 5 / math.sqrt(N), kept()
    for shift in (1, 2, 3, 4, 8, 16, 64, 128, 256, 512, 4096, N // 2, N // 3):
        assert abs(correlation(x.flatten(), x.flatten().roll(shift))) < bound
    for site in (1, 2, 3, 64):
        assert abs(correlation(x, kept(site=site))) < bound
    for seed in (0, 2, 3, -1, 1 << 32, 1 << 62):
        assert abs(correlation(x, kept(seed=seed))) < bound
    for rows_or_columns in (x.mean(0), x.mean(1)):
        deviation = 0.5 / math.sqrt(N / len(rows_or_columns))
        assert (rows_or_columns - 0.5).abs().max() < 6 * deviation


def test_backward_drops_what_forward_dropped() -> None:
    x = torch.randn(40, 50, dtype=torch.float64, requires_grad=True)
    out = drop(x, p=0.3)
    (grad,) = torch.autograd.grad(out, x, torch.full_like(x, 2.0))
    assert torch.equal(grad, 2 * drop(torch.ones_like(x), p=0.3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_elements_do_not_depend_on_the_dtype(dtype: torch.dtype) -> None:
    out = drop(torch.ones(1000, dtype=dtype), p=0.1)
    assert torch.equal(out != 0, drop(torch.ones(1000), p=0.1) != 0)
    assert out.max().item() == torch.tensor(1 / 0.9, dtype=dtype).item(), "scaled in full precision, rounded once"
