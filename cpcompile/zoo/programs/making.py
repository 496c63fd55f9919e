"""Making: programs are found by what users call them, and made as the models of the zoo are."""

from __future__ import annotations

from collections.abc import Collection

import torch

from cpcompile.zoo.build import MAX_PARAMETERS, drop_dropout, randomise
from cpcompile.zoo.inputs import Sampler
from cpcompile.zoo.programs.registry import PROGRAMS, Program

CATALOGUES = ("diffusion", "vision", "vision_language", "science", "handwritten")


def make_program(key: str) -> Program:
    """Return the program of this key in training mode, without dropout, with random parameters.

    Raises:
        NotAvailable: what it needs is not installed.
    """
    torch.manual_seed(0)
    made = PROGRAMS[key](Sampler())
    size = sum(p.numel() for p in made.model.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{key}: {size} parameters are not tiny.")
    randomise(made.model)
    drop_dropout(made.model)
    made.model.train()
    return made


def find_programs(catalogues: Collection[str], wanted: str = "") -> list[str]:
    """Return the keys of the programs of these catalogues that a key, a name or a catalogue means; all for ''."""
    keys = [key for name in CATALOGUES if name in catalogues for key in PROGRAMS if key.startswith(f"{name}:")]
    return [key for key in keys if not wanted or wanted in (key, *key.split(":"))]
