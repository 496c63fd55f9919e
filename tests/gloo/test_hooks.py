"""Hooks on gloo ranks against one device: of modules, added at any time, and of parameters, which see the summed gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cpcompile
from tests.models import batch, error, errors, gradients, loss_of, make

EXACT = 1e-12  # float64


def pair(rank: Any, backend: str, **options: Any) -> tuple[Any, nn.Module, nn.Module]:
    """Return what to call, the model that it computes on all ranks, and an untouched one with the same weights."""
    torch._dynamo.reset()
    model, alone = make("rotary", num_layers=1), make("rotary", num_layers=1)
    options = {"inner": "eager"} | options
    if backend == "apply":
        return cpcompile.apply(model, rank.mesh(), **options), model, alone
    options["mesh"] = rank.mesh()
    return torch.compile(model, backend="cpcompile", fullgraph=True, options=options), model, alone


def doubled(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return out * 2


def hooked(rank: Any, backend: str) -> dict[str, float]:
    """Errors before a hook is added, with it, and after it was removed; of lengths that the ranks do not divide."""
    call, model, alone = pair(rank, backend)
    found: dict[str, float] = {}
    handles: list[Any] = []
    for name, change in {
        "before": lambda m: None,
        "with": lambda m: handles.append(m.blocks[0].mlp.register_forward_hook(doubled)),
        "and before": lambda m: handles.append(
            m.norm.register_forward_pre_hook(lambda module, args, kwargs: ((args[0].sin(),), kwargs), with_kwargs=True)
        ),
        "after": lambda m: [handle.remove() for handle in handles],
    }.items():
        losses = []
        for module, run in ((model, call), (alone, alone)):
            change(module)
            losses.append(loss_of(run(**batch(alone, 31))))
            losses[-1].backward()
        found[f"loss {name}"] = error(losses[0].detach(), losses[1].detach())
        found |= {f"{n} {name}": x for n, x in errors(gradients(model), gradients(alone)).items()}
    return found


@pytest.mark.parametrize("backend", ["apply", "torch.compile"])
@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_hooks_of_modules_at_any_time(pool: Any, backend: str, world_size: int) -> None:
    for found in pool.run(world_size, hooked, backend):
        assert max(found.values()) < EXACT, found


def scaled(parameter: Tensor, log: list[Tensor]) -> None:
    parameter.register_hook(lambda grad: grad * 2)


def read(parameter: Tensor, log: list[Tensor]) -> None:
    parameter.register_hook(lambda grad: log.append(grad.clone()))


def optimized(parameter: Tensor, log: list[Tensor]) -> None:
    """Take an optimizer step in the backward, and keep no gradient."""
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)

    def step(p: Tensor) -> None:
        assert p.grad is not None
        log.append(p.grad.clone())
        optimizer.step()
        optimizer.zero_grad()

    parameter.register_post_accumulate_grad_hook(step)


KINDS: dict[str, Callable[[Tensor, list[Tensor]], None]] = {"scaled": scaled, "read": read, "optimized": optimized}


def of_parameters(rank: Any, backend: str, kind: str, inner: str, is_later: bool) -> dict[str, float]:
    """Errors of losses, of what hooks saw, of gradients and of parameters after three steps."""
    call, model, alone = pair(rank, backend, inner=inner)
    seen: list[dict[str, list[Tensor]]] = []
    losses: list[list[Tensor]] = []
    for module, run in ((model, call), (alone, alone)):
        seen.append({name: [] for name, _ in module.named_parameters()})
        losses.append([])
        for index, length in enumerate((31, 31, 20)):
            if index == is_later:
                for name, parameter in module.named_parameters():
                    KINDS[kind](parameter, seen[-1][name])
            loss = loss_of(run(**batch(alone, length, seed=index)))
            loss.backward()
            losses[-1].append(loss.detach())
    found = {f"loss {i}": error(a, b) for i, (a, b) in enumerate(zip(*losses, strict=True))}
    for name, expected in seen[1].items():
        assert len(seen[0][name]) == len(expected) == (0 if kind == "scaled" else 3 - is_later), name
        found |= {
            f"{name} seen {i}": error(a, b, 1e-6) for i, (a, b) in enumerate(zip(seen[0][name], expected, strict=True))
        }
    found |= errors(gradients(model), gradients(alone))
    weights = [{n: p.detach() for n, p in module.named_parameters()} for module in (model, alone)]
    return found | {f"{n} after": x for n, x in errors(*weights).items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "inner", "is_later"),
    [("apply", "eager", False), ("apply", "aot_eager", True), ("torch.compile", "eager", True)],
)
def test_hooks_of_parameters_see_the_gradients_of_one_device(
    pool: Any, kind: str, backend: str, inner: str, is_later: bool
) -> None:
    for found in pool.run(3, of_parameters, backend, kind, inner, is_later):
        assert max(found.values()) < EXACT, found
