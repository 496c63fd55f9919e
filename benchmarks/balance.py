"""Simulate all balancers on up to 4096 ranks: a table for docs/balance.md, a plot beside it. Host only.

python benchmarks/balance.py docs/balance.md docs/balance.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from cpcompile.balance import BALANCERS, MIXES, Load, simulate

TITLE = "## Results\n"
TOKENS = 1 << 22  # of the whole sequence: 1024 a rank on 4096
NAMES = [name for name in BALANCERS if name != "llama3"]  # which holds, computes and needs what `contiguous` does
COLUMNS = ((8, 65536), (64, 524288), (512, TOKENS), (4096, TOKENS))

Loads = dict[tuple[str, str, int], Load]


def main(page: Path, picture: Path) -> None:
    loads = {
        (mix, name, ranks): simulate(BALANCERS[name], length, ranks, MIXES[mix](length, seeded()))
        for ranks, length in COLUMNS
        for mix in MIXES
        for name in NAMES
    }
    before, _, _ = page.read_text().partition(TITLE)
    page.write_text(f"{before}{TITLE}\n{table(loads)}")
    plot(loads, picture)


def seeded() -> torch.Generator:
    """Return the generator of every mix, so that balancers see the same documents."""
    return torch.Generator().manual_seed(0)


def table(loads: Loads) -> str:
    heads = [f"{ranks} ranks, {length // 1024}k tokens" for ranks, length in COLUMNS]
    lines = [f"| documents | balancer | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for mix in MIXES:
        for name in NAMES:
            cells = (cell(loads[mix, name, ranks]) for ranks, _ in COLUMNS)
            lines.append(f"| {mix} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(load: Load) -> str:
    mebibytes = int(load.key_bytes.max()) / 2**20
    return f"{load.area_imbalance:.3f} · {load.token_imbalance:.3f} · {mebibytes:,.0f} · {int(load.runs.max())}"


def plot(loads: Loads, picture: Path) -> None:
    figure, axes = plt.subplots(2, len(MIXES), figsize=(11, 5.2), sharex=True, sharey="row", layout="constrained")
    ranks = [ranks for ranks, _ in COLUMNS]
    for column, mix in enumerate(MIXES):
        for name in NAMES:
            found = [loads[mix, name, count] for count in ranks]
            style = {"marker": "o", "linewidth": 2.4 if name == "balanced" else 1.2, "markersize": 3, "label": name}
            axes[0, column].loglog(ranks, [load.area_imbalance for load in found], **style)
            gibibytes = [max(float(load.key_bytes.max()) / 2**30, 1e-4) for load in found]
            axes[1, column].loglog(ranks, gibibytes, **style)
        axes[0, column].set_title(mix)
        axes[1, column].set_xlabel("ranks")
        axes[1, column].set_xticks(ranks, [str(count) for count in ranks])
    axes[0, 0].set_ylabel("work of the busiest rank\nover the mean")
    axes[1, 0].set_ylabel("GiB of keys and values\nthat a rank needs")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
