"""Plot the results of a benchmark: tokens per second and peak memory of each row.

python benchmarks/plot.py benchmarks/results/train_step.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(path: Path) -> None:
    result = json.loads(path.read_text())
    rows = result["rows"]
    names = [f"{row['strategy']}\n{row['ranks']} rank(s)" for row in rows]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, key, title in ((speed, "tokens_per_second", "tokens / s"), (memory, "peak_gib", "peak GiB of a rank")):
        bars = axes.bar(names, [row[key] for row in rows], width=0.5)
        axes.bar_label(bars)
        axes.set_title(title)
    figure.suptitle(
        f"Llama {result['shape']}, {rows[0]['length']} tokens, bf16, {result['device']}, torch {result['torch']}"
    )
    figure.savefig(path.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
