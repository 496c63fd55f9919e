"""`cpcompile plot`: pictures of masks, balance, benchmarks and traces."""

from __future__ import annotations

from cpcompile.commands.guard import guard
from cpcompile.inspect.plots.command import plot_commands

app = plot_commands(guard)
