"""Registry: programs by key, `catalogue:name`, each made by a function of that name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from cpcompile.zoo.inputs import Sampler


@dataclass(frozen=True, slots=True)
class Program:
    """A model with one batch for it.

    Attributes:
        model: whose output has a loss, or is one.
        inputs: its keyword arguments.
        options: of `cpcompile.verify`, as a user of this model would give them.
    """

    model: nn.Module
    inputs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)


Maker = Callable[[Sampler], Program]
PROGRAMS: dict[str, Maker] = {}


def program(catalogue: str) -> Callable[[Maker], Maker]:
    """Add a function that makes a program to a catalogue, under its own name."""

    def add(make: Maker) -> Maker:
        return add_program(catalogue, make.__name__, make)

    return add


def add_program(catalogue: str, name: str, make: Maker) -> Maker:
    """Add what makes a program to a catalogue."""
    key = f"{catalogue}:{name}"
    assert key not in PROGRAMS, f"{key} is there twice"
    PROGRAMS[key] = make
    return make
