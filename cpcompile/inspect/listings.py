"""Listings: the code of a graph before and after each pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from cpcompile.compile.transform import watching_passes
from cpcompile.inspect.explain import plan_for
from cpcompile.inspect.graph_listing import listing
from cpcompile.options.config import Config


def listings_of_passes(
    model: torch.nn.Module, inputs: Mapping[str, Any], *, world_size: int, inner_size: int = 0, **options: Any
) -> list[tuple[str, str, str]]:
    """Return (name, code before, code after) of each pass that runs on a model, in their order.

    Raises:
        CPError: the model is refused.
    """
    seen: list[tuple[str, str]] = []

    def see(name: str, gm: fx.GraphModule, places: int) -> None:
        seen.append((name, listing(gm)))

    config = Config.of({**options, "dynamic": False})
    with watching_passes(see):
        transformed = plan_for(model, inputs, world_size=world_size, inner_size=inner_size, config=config)
    before = [listing(transformed.original), *(code for _, code in seen)]
    return [(name, old, new) for (name, new), old in zip(seen, before, strict=False)]
