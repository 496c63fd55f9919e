"""Canvas: a matplotlib figure that becomes a file, or an error that says how to get matplotlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError

SUFFIXES = (".png", ".svg")


def check_suffix(out: Path) -> None:
    """Refuse a file that is no picture.

    Raises:
        ConfigError: the suffix is neither `.png` nor `.svg`.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the suffix says what is written, and is one of {', '.join(SUFFIXES)}.")


@contextmanager
def canvas(out: Path, rows: int, columns: int, size: tuple[float, float], dpi: int = 110) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its panels `[rows, columns]`, and write it when they are drawn.

    Raises:
        ConfigError: matplotlib is missing, or the suffix is of no picture.
    """
    check_suffix(out)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots are drawn by matplotlib, which is missing: pip install cpcompile[plot]") from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure, figure.subplots(rows, columns, squeeze=False)
    figure.savefig(out, dpi=dpi)
