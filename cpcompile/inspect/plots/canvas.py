"""Canvas: a matplotlib figure that becomes a file, or an error that says how to get matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError
from cpcompile.inspect.output_file import check_output, writing

SUFFIXES = (".png", ".svg")


@contextmanager
def canvas(out: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 110) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its panels `[rows, columns]`, and write it when they are drawn.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    check_output("--out", out, SUFFIXES)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots are drawn by matplotlib, which is missing: pip install cpcompile[plot]") from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure, figure.subplots(rows, columns, squeeze=False)
    with writing("--out", out):
        figure.savefig(out, dpi=dpi)
