"""Every form of attention is found, nothing else is, and what is found computes the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from cpcompile.capture.lowering import capture
from cpcompile.ir.operator_call import Call
from cpcompile.passes.find_attention import find_attention
from cpcompile.passes.functionalise_writes import functionalise_writes

Tensor = torch.Tensor
B, H, K, S, D = 2, 4, 2, 6, 8
CAUSAL = torch.ones(S, S, dtype=torch.bool).tril()
BIAS = torch.randn(S, S, dtype=torch.float64)


def captured(function: Callable[..., Any], *inputs: Tensor) -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Return the captured graph of a function and the arguments that it is called with."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        seen.extend((capture(gm, example_inputs), tuple(example_inputs)))
        functionalise_writes(seen[0])
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*inputs)
    return seen[0], seen[1]


def operands(num_key_heads: int = H, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(B, H, S, D), (B, num_key_heads, S, D), (B, num_key_heads, S, D)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def found(gm: fx.GraphModule) -> Call:
    """Return the one attention of a graph."""
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)
    return Call.of(node)


def assert_same(function: Callable[..., Tensor], *inputs: Tensor, atol: float = 1e-10, num_inputs: int = 3) -> Call:
    """Check that one attention is found, in place of all its nodes, with the values and gradients of the function."""
    gm, args = captured(function, *inputs)
    assert find_attention(gm) == 1
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert not [n for n in gm.graph.nodes if "softmax" in str(n.target) or "scaled_dot" in str(n.target)]
    text = str(gm.graph)
    assert (find_attention(gm), str(gm.graph)) == (0, text)
    (out,) = gm(*args)
    wanted = function(*inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(y.square().sum(), inputs[:num_inputs]) for y in (out, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=100 * atol)
    return found(gm)


def repeat(x: Tensor) -> Tensor:
    return x[:, :, None, :, :].expand(B, K, H // K, S, D).reshape(B, H, S, D)


def test_fused_positional_and_keyword() -> None:
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), *operands())
    assert call["is_causal"] and call["scale"] == D**-0.5
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5), *operands())
    assert call["is_causal"] and call["scale"] == 0.5
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), *operands(K))
    assert not call["is_causal"] and call.shape("k")[1] == K
    call = assert_same(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), *operands(), CAUSAL)
    assert call.tensor("mask").dtype is torch.bool


def assert_written_out(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """Check that a fused attention is written out, with the values and gradients of the function."""
    gm, args = captured(function, *inputs)
    assert find_attention(gm, exact_dropout=True) == 1
    gm.graph.lint()
    gm.recompile()
    targets = [str(node.target) for node in gm.graph.nodes]
    assert (targets.count("aten._safe_softmax.default"), targets.count("aten.matmul.default")) == (1, 2)
    assert not [t for t in targets if "scaled_dot" in t or "cpcompile" in t]
    text = str(gm.graph)
    assert (find_attention(gm, exact_dropout=True), str(gm.graph)) == (0, text)
    torch.manual_seed(3)
    (out,) = gm(*args)
    torch.manual_seed(3)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = function(*inputs)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-10)
    trained = [x for x in inputs if x.requires_grad]
    gradients = [torch.autograd.grad(y.square().sum(), trained) for y in (out, wanted)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-8)
    return gm


def test_fused_with_a_trained_bias_is_written_out() -> None:
    bias = torch.randn(1, H, S, S, dtype=torch.float64, requires_grad=True)
    assert_written_out(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.4), *operands(), bias)
    hidden = torch.zeros(S, S, dtype=torch.float64).masked_fill_(~CAUSAL.roll(-1, 0), float("-inf"))
    assert not hidden[-1].isinf().all() and hidden[0].isinf().sum() == S - 2
    assert_written_out(
        lambda q, k, v, m, h: F.scaled_dot_product_attention(q, k, v, m + h, enable_gqa=True),
        *operands(K),
        bias,
        hidden,
    )


def test_a_row_without_a_key_is_zero_when_written_out() -> None:
    bias = torch.randn(S, S, dtype=torch.float64, requires_grad=True)
    hidden = torch.zeros(S, S, dtype=torch.float64)
    hidden[2] = float("-inf")
    gm = assert_written_out(
        lambda q, k, v, m, h: F.scaled_dot_product_attention(q, k, v, m + h), *operands(), bias, hidden
    )
    _, args = captured(lambda q, k, v, m, h: F.scaled_dot_product_attention(q, k, v, m + h), *operands(), bias, hidden)
    assert gm(*args)[0][:, :, 2].abs().max() == 0


def test_fused_with_exact_dropout_is_written_out() -> None:
    assert_written_out(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25), *operands())
    assert_written_out(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True, enable_gqa=True),
        *operands(K),
    )
    assert_written_out(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, 0.5), *operands(), CAUSAL)


def test_fused_with_other_dims_is_written_out() -> None:
    def five(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]

    assert_written_out(five, *operands())
    assert_written_out(lambda q, k, v: F.scaled_dot_product_attention(q, k[:1], v[:1]), *operands())


def test_one_key_head_broadcasts() -> None:
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *operands(1))
    assert call.shape("k") == (B, 1, S, D)
    assert_same(lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, *operands(1))


def test_three_dims_get_one_head() -> None:
    inputs = [x[:, 0].detach().requires_grad_() for x in operands()]
    assert assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *inputs).shape("q") == (B, 1, S, D)
    assert_same(lambda q, k, v: torch.softmax(q @ k.transpose(1, 2), -1) @ v, *inputs)
    assert_same(lambda q, k, v: torch.bmm(torch.softmax(torch.bmm(q, k.mT) / 3, 2), v), *inputs)


REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "expand": repeat,
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, H // K, -1, -1).contiguous().view(B, H, S, D),
    "flatten": lambda x: x[:, :, None].expand(B, K, H // K, S, D).flatten(1, 2),
    "interleave": lambda x: x.repeat_interleave(H // K, dim=1),
    "view of one": lambda x: x.view(B, K, 1, S, D).expand(B, K, H // K, S, D).reshape(B, H, S, D),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeated_heads_are_grouped_heads(name: str) -> None:
    again = REPEATS[name]
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, again(k), again(v)), *operands(K))
    assert call.shape("k") == call.shape("v") == (B, K, S, D)
    call = assert_same(lambda q, k, v: torch.softmax(q @ again(k).transpose(-1, -2), -1) @ again(v), *operands(K))
    assert call.shape("k") == call.shape("v") == (B, K, S, D)


def test_tiled_heads_are_not_grouped_heads() -> None:
    """`repeat` puts the copies of a head `K` apart."""
    call = assert_same(
        lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)), *operands(K)
    )
    assert call.shape("k") == (B, H, S, D)
    call = assert_same(lambda q, k, v: F.scaled_dot_product_attention(q, repeat(k), v.repeat(1, 2, 1, 1)), *operands(K))
    assert call.shape("k") == call.shape("v") == (B, H, S, D)


def product(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(2, 3))


# The written-out forms, and (scale, softcap) that each has.
FORMS: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], float, float]] = {
    "bare": (lambda q, k, v: F.softmax(product(q, k), dim=-1) @ v, 1.0, 0.0),
    "scaled": (lambda q, k, v: F.softmax(product(q, k) * 0.3, dim=-1) @ v, 0.3, 0.0),
    "divided": (lambda q, k, v: F.softmax(product(q, k) / math.sqrt(D), dim=-1) @ v, D**-0.5, 0.0),
    "scaled twice": (lambda q, k, v: F.softmax(product(q, k) * 2 / 5, dim=3) @ v, 0.4, 0.0),
    "divided by a tensor": (lambda q, k, v: F.softmax(product(q, k) / torch.full([], 4.0), dim=-1) @ v, 0.25, 0.0),
    "scaled in place": (lambda q, k, v: F.softmax(product(q, k).mul_(0.3), dim=-1) @ v, 0.3, 0.0),
    "scaled queries": (lambda q, k, v: F.softmax(product(q * 0.3, k), dim=-1) @ v, 1.0, 0.0),
    "capped": (lambda q, k, v: F.softmax(torch.tanh(product(q, k) * 0.3 / 2.0) * 2.0, dim=-1) @ v, 0.3, 2.0),
    "uneven cap": (lambda q, k, v: F.softmax(torch.tanh(product(q, k) / 4.0) * 2.0, dim=-1) @ v, 0.5, 2.0),
    "other transposition": (lambda q, k, v: F.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)), dim=-1) @ v, 1.0, 0.0),
    "swapped last": (lambda q, k, v: F.softmax(q @ k.mT, dim=-1) @ v, 1.0, 0.0),
    "dropout in evaluation": (lambda q, k, v: F.dropout(F.softmax(product(q, k), dim=-1), 0.5, False) @ v, 1.0, 0.0),
}


@pytest.mark.parametrize("name", FORMS)
def test_written_out_forms(name: str) -> None:
    function, scale, softcap = FORMS[name]
    call = assert_same(function, *operands())
    assert (call["scale"], call["softcap"]) == (pytest.approx(scale), pytest.approx(softcap))


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda s, m: s + torch.where(m, 0.0, -30.0).double(),
    "added first": lambda s, m: torch.where(m, 0.0, -30.0).double() + s,
    "one for all rows": lambda s, m: s + m[0].double(),
    "added, then scaled": lambda s, m: (s + torch.where(m, 0.0, -30.0).double()) * 0.3,
    "subtracted, then scaled": lambda s, m: (s - torch.where(m, 0.0, 30.0).double()) / 3,
    "added in place": lambda s, m: s.add_(torch.where(m, 0.0, -30.0).double()),
    "filled": lambda s, m: s.masked_fill(~m, float("-inf")),
    "filled in place": lambda s, m: s.masked_fill_(~m, float("-inf")),
    "filled with the least number": lambda s, m: s.masked_fill(~m, torch.finfo(s.dtype).min),
    "where": lambda s, m: torch.where(m, s, float("-inf")),
    "where not": lambda s, m: torch.where(~m, torch.full([], float("-inf"), dtype=s.dtype), s),
    "filled twice": lambda s, m: s.masked_fill(~m, float("-inf")).masked_fill(~m.roll(1, 0), float("-inf")),
    "added and filled": lambda s, m: (s + m.double()).masked_fill(~m, float("-inf")),
}


@pytest.mark.parametrize("name", MASKS)
def test_written_out_masks(name: str) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        return F.softmax(MASKS[name](product(q, k) * 0.3, m), dim=-1) @ v

    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:, 0] = True
    if name == "filled twice":
        mask = torch.ones(S, S, dtype=torch.bool)
        mask[1:, 2] = False
    assert assert_same(function, *operands(), mask)["mask"] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_in_single_precision(dtype: torch.dtype) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(product(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v

    def all_in_single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(product(q.float(), k.float()), dim=-1).to(v.dtype) @ v

    for form in (function, all_in_single):
        gm, _ = captured(form, *operands(dtype=dtype))
        assert find_attention(gm) == 1
        assert {found(gm).tensor(name).dtype for name in ("q", "k", "v")} == {dtype}


def returns_weights(q: Tensor, k: Tensor, v: Tensor) -> Any:
    weights = F.softmax(product(q, k), dim=-1)
    return weights @ v, weights


def returns_scores(q: Tensor, k: Tensor, v: Tensor) -> Any:
    scores = product(q, k)
    return F.softmax(scores, dim=-1) @ v, scores


def weights_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = F.softmax(product(q, k), dim=-1)
    return weights @ v


OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "weights are returned": returns_weights,
    "scores are returned": returns_scores,
    "no gradient of the weights": weights_without_gradient,
    "softmax over queries": lambda q, k, v: F.softmax(product(q, k), dim=-2) @ v,
    "capped after the mask": lambda q, k, v: F.softmax((product(q, k) + q.detach()[..., :1]).tanh(), dim=-1) @ v,
    "negative scale": lambda q, k, v: F.softmax(product(q, k) * -1.0, dim=-1) @ v,
    "learned bias": lambda q, k, v: F.softmax(product(q, k) + v[..., :1], dim=-1) @ v,
    "finite fill": lambda q, k, v: F.softmax(product(q, k).masked_fill(q[..., :1] > 0, -1.0), dim=-1) @ v,
    "weights on the right": lambda q, k, v: v.mT @ F.softmax(product(q, k), dim=-1),
    "no product": lambda q, k, v: F.softmax(q, dim=-1) @ k.mT,
    "weights are changed": lambda q, k, v: (F.softmax(product(q, k), dim=-1) + 1) @ v,
    "dropout of all": lambda q, k, v: F.dropout(F.softmax(product(q, k), dim=-1), 1.0) @ v,
    "two dropouts": lambda q, k, v: F.dropout(F.dropout(F.softmax(product(q, k), dim=-1), 0.5), 0.5) @ v,
    "dropout of no square": lambda q, k, v: F.dropout(F.softmax(product(q[:, :, 1:], k), dim=-1), 0.5) @ v,
    "only a product": lambda q, k, v: product(q, k) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    gm, _ = captured(OTHERS[name], *operands())
    text = str(gm.graph)
    assert (find_attention(gm), str(gm.graph)) == (0, text)


def with_sinks(scores: Tensor, sinks: Tensor) -> Tensor:
    return torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(B, H, S, 1)], dim=-1)


def shifted(logits: Tensor) -> Tensor:
    return logits - logits.max(dim=-1, keepdim=True).values


SINKS: dict[str, Callable[..., Tensor]] = {
    "bare": lambda q, k, v, s: torch.softmax(with_sinks(product(q, k), s), -1)[..., :-1] @ v,
    "shifted": lambda q, k, v, s: torch.softmax(shifted(with_sinks(product(q, k) * 0.3, s)), -1)[..., :-1] @ v,
    "shifted by amax": lambda q, k, v, s: (
        (x := with_sinks(product(q, k), s)).sub(x.amax(-1, True).detach()).softmax(-1)[..., :S] @ v
    ),
    "masked": lambda q, k, v, s: (
        torch.softmax(with_sinks(product(q, k).masked_fill(~CAUSAL, -math.inf), s), -1)[..., :-1] @ v
    ),
    "a row without a key": lambda q, k, v, s: (
        torch.softmax(with_sinks(product(q, k).masked_fill(CAUSAL, -math.inf), s), -1)[..., :-1] @ v
    ),
    "one for all heads": lambda q, k, v, s: torch.softmax(with_sinks(product(q, k), s[:1]), -1)[..., :-1] @ v,
    "of another rank": lambda q, k, v, s: (
        torch.softmax(torch.cat([product(q, k), s[:, None, None].expand(B, H, S, 1)], -1), -1)[..., :-1] @ v
    ),
}


@pytest.mark.parametrize("name", SINKS)
def test_sinks(name: str) -> None:
    sinks = torch.randn(H, dtype=torch.float64, requires_grad=True)
    call = assert_same(SINKS[name], *operands(), sinks, num_inputs=4)
    assert call.shape("sinks") == (H,)


def sinks_without_gradient(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> Tensor:
    with torch.no_grad():
        column = s.view(1, H, 1, 1).expand(B, H, S, 1)
    return torch.cat([product(q, k), column], -1).softmax(-1)[..., :-1] @ v


OTHER_SINKS: dict[str, Callable[..., Tensor]] = {
    "first column dropped": lambda q, k, v, s: torch.softmax(with_sinks(product(q, k), s), -1)[..., 1:] @ v,
    "another row's largest": lambda q, k, v, s: (
        (x := with_sinks(product(q, k), s)).sub(x.amax(-2, True)).softmax(-1)[..., :-1] @ v
    ),
    "of queries": lambda q, k, v, s: torch.cat([product(q, k), q[..., :1]], -1).softmax(-1)[..., :-1] @ v,
    "two columns": lambda q, k, v, s: (
        torch.cat([product(q, k), s.view(1, H, 1, 1).expand(B, H, S, 2)], -1).softmax(-1)[..., :-2] @ v
    ),
    "repeated without gradient": sinks_without_gradient,
    "nothing dropped": lambda q, k, v, s: with_sinks(product(q, k), s).softmax(-1) @ F.pad(v, (0, 0, 0, 1)),
}


@pytest.mark.parametrize("name", OTHER_SINKS)
def test_other_columns_are_left_alone(name: str) -> None:
    gm, _ = captured(OTHER_SINKS[name], *operands(), torch.randn(H, dtype=torch.float64, requires_grad=True))
    text = str(gm.graph)
    assert (find_attention(gm), str(gm.graph)) == (0, text)


DROPOUTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.25, True, scale=1.0),
    "written out": lambda q, k, v: (
        F.dropout(F.softmax(product(q, k).masked_fill(~CAUSAL, -math.inf), dim=-1), 0.25) @ v
    ),
    "converted": lambda q, k, v: F.dropout(F.softmax(product(q, k), dim=-1, dtype=torch.double).to(v.dtype), 0.25) @ v,
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_is_a_term_of_the_operator(name: str) -> None:
    q, k, v = operands()
    gm, args = captured(DROPOUTS[name], q, k, torch.ones_like(v))
    assert find_attention(gm) == 1
    assert found(gm)["dropout"] == 0.25
    gm.graph.lint()
    gm.recompile()
    outputs = torch.stack([gm(*args)[0] for _ in range(400)])
    torch.testing.assert_close(outputs.mean(0), torch.ones_like(v), rtol=0, atol=0.2)
    # Weights are dropped by themselves, with their rate: rows of one key are 0 or 4/3.
    assert name == "converted" or outputs[:, :, :, 0].unique().tolist() == pytest.approx([0, 4 / 3])


@pytest.mark.parametrize("name", DROPOUTS)
def test_exact_dropout_stays_written_out(name: str) -> None:
    gm, _ = captured(DROPOUTS[name], *operands())
    find_attention(gm, exact_dropout=True)
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.attention.default)


def test_new_nodes_carry_their_place_and_value() -> None:
    gm, _ = captured(FORMS["capped"][0], *operands())
    original = copy.deepcopy(gm)
    find_attention(gm)
    node = found(gm).node
    (end,) = [n for n in original.graph.nodes if n.op == "call_function"][-1:]
    assert node.meta["stack_trace"] == end.meta["stack_trace"]
    assert node.meta["val"].shape == (B, H, S, D)
