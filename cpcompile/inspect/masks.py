"""Masks: the attention matrices that people ask to see, by the name of a mask and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from cpcompile.balance.layout import DOCUMENT_LAYOUTS, LAYOUTS
from cpcompile.errors import ConfigError
from cpcompile.inspect.areas import Matrix, matrix_of
from cpcompile.runtime.schedule import Band, Visible

MASKS = ("causal", "window", "packed", "joint")


def matrices(
    mask: str,
    *,
    length: int,
    world_size: int,
    layouts: Sequence[str],
    window: int = 0,
    documents: Sequence[int] = (),
    parts: Sequence[int] = (),
) -> list[Matrix]:
    """Return the matrix of a mask in each layout.

    Raises:
        ConfigError: a name is unknown, or the numbers do not belong to the mask.
    """
    if mask not in MASKS:
        raise ConfigError(f"mask={mask!r}: expected one of {', '.join(MASKS)}.")
    unknown = [name for name in layouts if name not in (*LAYOUTS, *DOCUMENT_LAYOUTS)]
    if unknown:
        raise ConfigError(
            f"no layout is named {unknown[0]!r}: expected one of {', '.join(LAYOUTS + DOCUMENT_LAYOUTS)}."
        )
    if world_size < 1 or length < world_size:
        raise ConfigError(f"{length} tokens on {world_size} ranks: each rank needs one at least.")
    given = {"window": bool(window), "packed": bool(documents), "joint": bool(parts)}
    wanted = {"window": "window, a number of keys", "packed": "documents", "joint": "parts"}
    for name, is_given in given.items():
        if is_given != (name == mask):
            needs = (
                f"the mask {mask} needs {wanted[mask]}" if mask == name else f"{wanted[name]} are of the mask {name}"
            )
            raise ConfigError(f"{needs}: pass it, or another mask than {mask}.")
    for name, sizes in (("documents", documents), ("parts", parts)):
        if sizes and (sum(sizes) != length or min(sizes) < 1):
            raise ConfigError(
                f"{name}={list(sizes)} have {sum(sizes)} tokens, the sequence {length}: they must be as many."
            )
    band = Band() if mask == "joint" else Band(1 - window if window else None, 0)
    starts = [0, *accumulate(documents)][: len(documents)]
    return [matrix_of(length, world_size, layout, Visible(band), documents=starts, parts=parts) for layout in layouts]
