"""Scaling: percent of the limit and of weak scaling over GPUs, out of a result of `benchmarks/scaling.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpcompile.errors import ConfigError
from cpcompile.inspect.plots.canvas import canvas

Row = dict[str, Any]
TITLES = {
    "causal_8k_a_gpu": "8k tokens a GPU",
    "causal_64k": "64k tokens",
    "causal_128k": "128k tokens",
    "packed_64k_random_16": "64k tokens, 16 documents",
    "packed_8k_a_gpu": "8k tokens a GPU, 5 documents",
    "window_4k_of_64k": "64k tokens, window of 4k",
}
COLORS = {"ring": "tab:blue", "ulysses": "tab:green", "gather": "tab:cyan", "halo": "tab:purple", "usp": "tab:olive"}
PEER_COLORS = {"torch": "tab:brown", "ringmaster": "tab:orange", "yunchang": "black"}
# Percent of the limit at 8 GPUs, and the strategies that it is asked of; training in percent of weak scaling.
TARGETS = {"causal": (95, ("ring", "usp")), "packed": (85, ("ring", "gather", "usp", "ulysses"))}
TRAIN_TARGET = 90


def read_result(path: Path) -> Row:
    """Return a result.

    Raises:
        ConfigError: the file is not one of `benchmarks/scaling.py`.
    """
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as a result: {error}") from error
    wanted = {"kind", "rows", "train", "commit"}
    if not isinstance(result, dict) or not wanted <= result.keys():
        raise ConfigError(f"{path} is no result of benchmarks/scaling.py, which has {', '.join(sorted(wanted))}.")
    return result


def label(row: Row) -> str:
    """Return a short name of a row."""
    if row["system"] == "cpcompile":
        return f"{row['strategy']} ({row['layout']})"
    kernel = f" ({row['kernel']})" if row["kernel"] != "auto" else ""
    return f"{row['system']} {row['strategy'].replace('_flash_attn', '')}{kernel}"


def ordered(rows: list[Row]) -> dict[str, list[Row]]:
    """Return the rows of each case, in the order of the titles."""
    by_case = {case: [row for row in rows if row["case"] == case] for case in TITLES}
    return {case: found for case, found in by_case.items() if found}


def provenance(result: Row) -> str:
    """Return what a result depends on."""
    runs = ", ".join(str(ranks) for ranks in sorted({run["ranks"] for run in result["runs"]}))
    peers = ", ".join(f"{name} {version}" for name, version in result.get("peers", {}).items())
    names = ("torch", "cuda", "cudnn", "nccl")
    versions = ", ".join(f"{name} {result[name]}" for name in names if result.get(name))
    scale = f"lengths divided by {result['scale']}" if result["scale"] > 1 else ""
    device = f"{result.get('device') or 'unknown'}, runs on {runs} of them"
    return "; ".join(filter(None, (device, versions, f"commit {result['commit'] or 'not recorded'}", peers, scale)))


def plot_scaling(result: Row, out: Path) -> None:
    """Draw percent of the limit over ranks for each case, the training step, and predicted against measured times."""
    is_measured = result["kind"] == "measured"
    value = "percent_of_limit" if is_measured else "predicted_percent"
    by_case = ordered([row for row in result["rows"] if value in row and row.get("layout") != "whole"])
    count = len(by_case) + 1 + is_measured
    lines = -(-count // 4)
    with canvas(out, lines, 4, (19, 4.4 * lines)) as (figure, all_axes):
        panels = list(all_axes.flat)
        for axes in panels[count:]:
            axes.set_axis_off()
        for axes, (case, rows) in zip(panels, by_case.items(), strict=False):
            draw_case(axes, case, rows, value)
        draw_train(panels[len(by_case)], result)
        if is_measured:
            draw_compared(panels[count - 1], result)
        what = (
            provenance(result) if is_measured else f"predicted for H100 at commit {result['commit']}, nothing measured"
        )
        figure.suptitle(f"32 query and 8 key heads of 128, bfloat16, causal, forward and backward\n{what}", fontsize=9)


def draw_case(axes: Any, case: str, rows: list[Row], value: str) -> None:
    """Draw a line for each system, and dots where the cost model puts it."""
    for name in dict.fromkeys(label(row) for row in rows):
        found = sorted((row for row in rows if label(row) == name), key=lambda row: row["ranks"])
        own = found[0]["system"] == "cpcompile"
        peer = PEER_COLORS.get(name.split()[0], "tab:red") if "llama3" not in name else "tab:pink"
        style = {"color": COLORS.get(found[0]["strategy"].split()[0]) if own else peer, "linewidth": 2 if own else 1}
        style |= {"linestyle": "-" if own and found[0]["layout"] != "contiguous" else "--" if own else ":"}
        style |= {"marker": "s" if found[0]["layout"].startswith("balanced") else "o", "markersize": 4, "label": name}
        (line,) = axes.plot([row["ranks"] for row in found], [row[value] for row in found], **style)
        if value == "percent_of_limit" and own:
            guesses = [row["predicted_percent"] for row in found]
            axes.plot([r["ranks"] for r in found], guesses, "x", color=line.get_color(), alpha=0.6)
    target = TARGETS.get(case.split("_")[0])
    if target:
        axes.axhline(target[0], color="black", linewidth=0.8, linestyle=":")
    axes.axhline(100, color="lightgray", linewidth=0.8)
    finish(axes, f"{TITLES[case]}: % of the limit" + (", x predicted" if value == "percent_of_limit" else ""), rows)


def draw_train(axes: Any, result: Row) -> None:
    """Draw the weak scaling of the training step."""
    name = "efficiency" if result["kind"] == "measured" else "predicted_efficiency"
    for key, text in (
        (name, "FLOP/s of a GPU, of one GPU's"),
        ("efficiency_of_equal_work", "of one GPU on the same tokens"),
    ):
        rows = sorted((row for row in result["train"] if key in row), key=lambda row: row["ranks"])
        rows = [row for row in rows if row["ranks"] > 1 or row["length"] == min(r["length"] for r in rows)]
        if rows:
            axes.plot([r["ranks"] for r in rows], [100 * r[key] for r in rows], marker="o", markersize=4, label=text)
    axes.axhline(TRAIN_TARGET, color="black", linewidth=0.8, linestyle=":")
    axes.axhline(100, color="lightgray", linewidth=0.8)
    finish(axes, "training step of the 1B model: weak scaling, %", result["train"])


def draw_compared(axes: Any, result: Row) -> None:
    """Draw measured against predicted milliseconds."""
    rows = [row for row in result["rows"] if "measured_over_predicted" in row]
    for strategy, color in COLORS.items():
        found = [row for row in rows if row["strategy"].split()[0] == strategy]
        axes.loglog(
            [r["predicted_ms"] for r in found],
            [r["total_ms"] for r in found],
            "o",
            color=color,
            markersize=4,
            label=strategy,
        )
    steps = result["train"]
    axes.loglog([r["predicted_ms"] for r in steps], [r["ms"] for r in steps], "k^", markersize=4, label="training step")
    both = [row["predicted_ms"] for row in rows + steps] or [1.0]
    axes.loglog([min(both), max(both)], [min(both), max(both)], color="gray", linewidth=0.8)
    axes.set_xlabel("predicted ms")
    axes.set_title("measured ms against predicted", fontsize=9)
    axes.legend(fontsize=6, frameon=False)


def finish(axes: Any, title: str, rows: list[Row]) -> None:
    """Label a panel."""
    ranks = sorted({row["ranks"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(count) for count in ranks])
    axes.set_ylim(bottom=min(50, axes.get_ylim()[0]))
    axes.set_xlabel("GPUs")
    axes.set_title(title, fontsize=9)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6, frameon=False)
