"""A model that computes something else since it was compiled is compiled again: hooks, functions of classes, submodules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize

from cpcompile import GraphBreakError
from cpcompile.capture.dynamo import compile_whole
from cpcompile.options.config import Config

IDS = torch.arange(26).reshape(2, 13) % 7


class Layer(nn.Module):
    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def squash(self, x: Tensor) -> Tensor:
        return x.tanh()

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return self.squash(self.linear(x)) * self.factor + shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, shift=0.5)
        return x.pow(2).mean()


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def replaced(owner: Any, name: str, value: Any) -> Callable[[], None]:
    """Replace what an object or a class has under a name; returns how to undo it."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    return lambda: delattr(owner, name) if before is None else setattr(owner, name, before)


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def other_layer(model: Model) -> Callable[[], None]:
    before, model.layers[1] = model.layers[1], nn.Identity()
    model.layers[1].forward = lambda x, shift: x.sin()
    return lambda: model.layers.__setitem__(1, before)


def parametrized(model: Model) -> Callable[[], None]:
    linear = model.layers[1].linear
    parametrize.register_parametrization(linear, "weight", Tripled())
    return lambda: parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)  # type: ignore[return-value]


FORWARD, LINEAR, SQUASH = Layer.forward, nn.Linear.forward, Layer.squash
CHANGES: dict[str, Callable[[Model], Callable[[], Any]]] = {
    "forward hook": lambda m: m.layers[1].register_forward_hook(doubled).remove,
    "forward hook of a leaf": lambda m: m.layers[1].linear.register_forward_hook(doubled, always_call=True).remove,
    "forward hook of an embedding": lambda m: m.embed.register_forward_hook(doubled).remove,
    "forward hook with kwargs": lambda m: (
        m.layers[1]
        .register_forward_hook(lambda module, args, kwargs, out: out * kwargs["shift"], with_kwargs=True)
        .remove
    ),
    "forward pre hook": lambda m: m.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2,)).remove,
    "forward pre hook with kwargs": lambda m: (
        m.layers[1]
        .register_forward_pre_hook(lambda module, args, kwargs: ((args[0] * 2,), {"shift": 3.0}), with_kwargs=True)
        .remove
    ),
    "hook of all modules": lambda m: (
        register_module_forward_hook(lambda module, args, out: out * 2 if isinstance(module, Layer) else None).remove
    ),
    "pre hook of all modules": lambda m: (
        register_module_forward_pre_hook(
            lambda module, args: (args[0] * 2,) if isinstance(module, nn.Linear) else None
        ).remove
    ),
    "forward of a module": lambda m: replaced(m.layers[1], "forward", lambda x, shift: x * shift),
    "forward of a class": lambda m: replaced(Layer, "forward", lambda self, x, shift: 2 * FORWARD(self, x, shift)),
    "forward of a class of torch": lambda m: replaced(nn.Linear, "forward", lambda self, x: 2 * LINEAR(self, x)),
    "method of a class": lambda m: replaced(Layer, "squash", lambda self, x: x.sin()),
    "call of a class": lambda m: replaced(
        Layer, "__call__", lambda self, *args, **kwargs: 2 * nn.Module.__call__(self, *args, **kwargs)
    ),
    "attribute of a class": lambda m: replaced(Layer, "factor", 2.0),
    "submodule": other_layer,
    "parametrization": parametrized,
}


def step(model: Model, forward: Callable[..., Tensor]) -> list[Tensor]:
    """Return loss and gradients, those of what stays."""
    parameters = [model.embed.weight, *model.layers[0].parameters()]
    loss = forward(input_ids=IDS)
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_compiles_again(change: Callable[[Model], Callable[[], Any]]) -> None:
    model, graphs = Model().double(), []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = compile_whole(model.forward, backend, Config())
    original = step(model, model.forward)
    for _ in range(2):
        torch.testing.assert_close(step(model, compiled), original, rtol=1e-12, atol=0)
    assert len(graphs) == 1
    undo = change(model)
    try:
        changed = step(model, model.forward)
        assert not torch.allclose(changed[0], original[0]), "the change is one"
        torch.testing.assert_close(step(model, compiled), changed, rtol=1e-12, atol=0)
        assert len(graphs) == 2
    finally:
        undo()
    torch.testing.assert_close(step(model, compiled), original, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "kind", ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"]
)
@pytest.mark.parametrize("is_later", [False, True])
def test_backward_hooks_of_submodules_are_refused(kind: str, is_later: bool) -> None:
    model = Model()
    compiled = compile_whole(model.forward, lambda gm, inputs: gm.forward, Config())
    if is_later:
        compiled(input_ids=IDS)
    handle = getattr(model.layers[1], kind)(lambda *args: None)
    with pytest.raises(GraphBreakError) as error:
        compiled(input_ids=IDS)
    text = str(error.value)
    assert "backward hooks of modules inside the model cannot be traced: layers.1." in text
    assert "x = layer(x, shift=0.5)" in text and f"{__file__}:" in text
    assert "register_post_accumulate_grad_hook" in text
    handle.remove()
    compiled(input_ids=IDS)
