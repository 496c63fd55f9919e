"""Held step: what the second run of a step needs of the first, by reference where that is enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from cpcompile.capture.lowering import placeholders
from cpcompile.capture.writes.aliases import hidden_writes, written_arguments
from cpcompile.compile.parameter_writes import parameter_writes
from cpcompile.front.held_buffers import version_of
from cpcompile.front.magnitudes import Magnitudes

Tensor = torch.Tensor


@dataclass(slots=True)
class HeldStep:
    """One call of a graph.

    Attributes:
        device: the kind of device that it runs on.
        given: its inputs, in their own memory; copies of those that the graph overwrites.
        needs: which of them take a gradient.
        versions: how often each had been written.
        generators: the states of the random generators; none where the graph draws nothing.
        autocast: whether autocast was on, and its dtype.
        gradients: what backward was given, by the place of the output.
        outputs: how large what was looked at of the outputs is.
    """

    device: str
    given: list[Any]
    needs: list[bool]
    versions: list[int]
    generators: list[Tensor]
    autocast: tuple[bool, torch.dtype]
    gradients: dict[int, Tensor] = field(default_factory=dict)
    outputs: Magnitudes | None = None

    @classmethod
    def of(cls, given: Sequence[Any], overwritten: Sequence[int], device: str, *, draws: bool) -> HeldStep:
        """Hold what a graph is about to be called with."""
        held = [x.detach() if isinstance(x, Tensor) else x for x in given]
        for i in overwritten:
            held[i] = held[i].clone()
        needs = [isinstance(x, Tensor) and x.requires_grad for x in given]
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(device, held, needs, versions(held), generators(device) if draws else [], autocast)

    def leaves(self) -> list[Any]:
        """Return the inputs once more, whose gradients are nobody else's."""
        pairs = zip(self.given, self.needs, strict=True)
        return [x.detach().requires_grad_() if needed else x for x, needed in pairs]

    def written(self) -> list[int]:
        """Return the places of inputs that were written since."""
        pairs = zip(self.versions, versions(self.given), strict=True)
        return [i for i, (before, now) in enumerate(pairs) if before != now]

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Surround a second run: generators, autocast and recording of gradients are as in the first, and then as before."""
        enabled, dtype = self.autocast
        now = generators(self.device) if self.generators else []
        set_generators(self.generators)
        try:
            with torch.autocast(self.device, dtype, enabled=enabled), torch.set_grad_enabled(bool(self.gradients)):
                yield
        finally:
            set_generators(now)


def overwritten_inputs(graph: fx.GraphModule) -> list[int]:
    """Return the places of the inputs that a call overwrites."""
    places = {node: i for i, node in enumerate(placeholders(graph))}
    nodes = [x for node in graph.graph.nodes for x in (*written_arguments(node).values(), *hidden_writes(node))]
    found = {places[node] for node in nodes if isinstance(node, fx.Node) and node in places}
    return sorted(found | set(parameter_writes(graph)))


def versions(given: Sequence[Any]) -> list[int]:
    """Return how often each tensor was written."""
    return [version_of(x) if isinstance(x, Tensor) else 0 for x in given]


def generators(device: str) -> list[Tensor]:
    """Return the states of the default generators: of the CPU, then of this GPU."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def set_generators(states: Sequence[Tensor]) -> None:
    """Give the default generators these states."""
    for state, put in zip(states, (torch.set_rng_state, torch.cuda.set_rng_state), strict=False):
        put(state)
