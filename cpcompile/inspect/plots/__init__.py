"""Plots: masks, balance, scaling and traces as PNG or SVG, by matplotlib (`pip install cpcompile[plot]`)."""
