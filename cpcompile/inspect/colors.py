"""Colours: one for each rank, the same in every picture, of middle lightness so that light and dark grounds take them."""

from __future__ import annotations

import colorsys

PALETTE = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#2aa5a0", "#c9a227", "#9c755f")


def color_of(index: int, count: int) -> str:
    """Return the colour of one of `count` ranks or kinds."""
    if count <= len(PALETTE):
        return PALETTE[index]
    # Neighbours, which share the longest edges, differ in lightness too.
    red, green, blue = colorsys.hls_to_rgb(index / count, 0.48 if index % 2 else 0.6, 0.5)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
