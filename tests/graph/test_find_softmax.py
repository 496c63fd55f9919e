"""Exponentials over their sum become a softmax of the same values and gradients; others stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes.find_softmax import find_softmax

Form = Callable[[Tensor], Tensor]
MASK = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])


def known(x: Tensor) -> Tensor:
    """Return zeros and ones that the graph makes itself."""
    return torch.ones(5, 5, dtype=x.dtype).tril()


FORMS: dict[str, Form] = {
    "div": lambda x: (e := x.exp()) / e.sum(-1, keepdim=True),
    "computed twice": lambda x: torch.exp(x) / torch.exp(x).sum(dim=2, keepdim=True),
    "unsqueezed": lambda x: (e := x.exp()) / e.sum(-1).unsqueeze(-1),
    "shifted": lambda x: (e := (x - x.amax(-1, True)).exp()) / e.sum(-1, True),
    "log_softmax": lambda x: x.log_softmax(-1).exp(),
    "logsumexp": lambda x: torch.exp(x - torch.logsumexp(x, -1, keepdim=True)),
    "masked": lambda x: (e := x.exp() * known(x)) / e.sum(-1, True),
    "filled": lambda x: (e := x.exp().masked_fill(known(x) == 0, 0)) / e.sum(-1, True),
    "chosen": lambda x: (e := torch.where(known(x) > 0, x.exp(), 0)) / e.sum(-1, True),
    "of a product": lambda x: (e := x.exp()) @ x / e.sum(-1, True),
}


def with_a_constant_sum(x: Tensor) -> Tensor:
    """Return what a softmax would be, without its whole gradient."""
    e = x.exp()
    with torch.no_grad():
        total = x.exp().sum(-1, keepdim=True)
    return e / total


OTHERS: dict[str, Form] = {
    "no sum": lambda x: x.exp() / 2,
    "over rows": lambda x: (e := x.exp()) / e.sum(-2, True),
    "over all": lambda x: (e := x.exp()) / e.sum(),
    "of other exponentials": lambda x: x.exp() / (2 * x).exp().sum(-1, True),
    "of more": lambda x: (e := x.exp()) / (e.sum(-1, True) + 1),
    "masked by unknown numbers": lambda x: (e := x.exp() * MASK) / e.sum(-1, True),
    "masked above only": lambda x: x.exp() * known(x) / x.exp().sum(-1, True),
    "no exponentials": lambda x: x.abs() / x.abs().sum(-1, True),
    "log_softmax over rows": lambda x: x.log_softmax(-2).exp(),
    "logsumexp over rows": lambda x: torch.exp(x - x.logsumexp(-2, True)),
    "logsumexp of others": lambda x: torch.exp(x - (2 * x).logsumexp(-1, True)),
    "over a constant sum": with_a_constant_sum,
    "over a detached sum": lambda x: (e := x.exp()) / e.sum(-1, True).detach(),
    "over the weights": lambda x: x @ (e := x.exp()) / e.sum(-1, True),
}


def traced(form: Form) -> fx.GraphModule:
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    gm: fx.GraphModule = make_fx(
        lambda x: form(x), tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
    )(x)
    return gm


@pytest.mark.parametrize("name", FORMS)
def test_softmax_is_found(name: str) -> None:
    gm = traced(FORMS[name])
    assert find_softmax(gm) == 1
    gm.graph.lint()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    outs = gm(x), FORMS[name](x)
    torch.testing.assert_close(*outs, rtol=0, atol=1e-14)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in outs), rtol=0, atol=1e-13)
    text = str(gm.graph)
    assert (find_softmax(gm), str(gm.graph)) == (0, text)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    gm = traced(OTHERS[name])
    text = str(gm.graph)
    assert (find_softmax(gm), str(gm.graph)) == (0, text)


def test_it_does_not_overflow() -> None:
    gm = traced(FORMS["div"])
    find_softmax(gm)
    gm.recompile()
    x = torch.full((2, 5, 5), 1000.0, dtype=torch.float64)
    assert gm(x).sum() == pytest.approx(10)
    assert math.isnan(FORMS["div"](x).sum())
