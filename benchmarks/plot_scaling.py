"""Write the tables of docs/scaling.md and draw its plots.

python benchmarks/plot_scaling.py    # results/scaling.json where it is, results/scaling_predicted.json and results/one_rank.json
python benchmarks/plot_scaling.py results/scaling_h200x4.json --docs docs/scaling_h200.md --picture docs/scaling_h200.png
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
HERE = Path(__file__).parent
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
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
PUBLISHED = {"causal": "90%", "packed": "58 to 76%"}  # of its kernel, by its README, on 8 GPUs
# Percent of the limit at 8 GPUs, and the strategies that it is asked of; training in percent of weak scaling.
TARGETS = {"causal": (95, ("ring", "usp")), "packed": (85, ("ring", "gather", "usp", "ulysses"))}
TRAIN_TARGET = 90


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


def grid(rows: list[Row], cell: Any) -> list[str]:
    """Return a table with a line for each system and a column for each number of ranks."""
    ranks = sorted({row["ranks"] for row in rows})
    lines = [f"| | {' | '.join(f'{count} GPUs' if count > 1 else '1 GPU' for count in ranks)} |"]
    lines.append("|---" * (1 + len(ranks)) + "|")
    for name in dict.fromkeys(label(row) for row in rows):
        found = {row["ranks"]: row for row in rows if label(row) == name}
        lines.append(f"| {name} | {' | '.join(cell(found[count]) if count in found else '' for count in ranks)} |")
    return [*lines, ""]


def predicted(result: Row) -> list[str]:
    """Return the tables of the predictions."""
    lines = ["Each cell: predicted ms · percent of the predicted limit.", ""]
    for case, rows in ordered(result["rows"]).items():
        lines += [f"**{TITLES[case]}**", ""]
        lines += grid(rows, lambda row: f"{row['predicted_ms']:.2f} · {row['predicted_percent']:.0f}%")
    lines += ["**Training step of the 1B model**", "", "| GPUs | tokens | attention | predicted ms | efficiency |"]
    lines.append("|---" * 5 + "|")
    for row in result["train"]:
        efficiency = f"{100 * row['predicted_efficiency']:.0f}%"
        lines.append(f"| {row['ranks']} | {row['length']} | {row['pick']} | {row['predicted_ms']:.1f} | {efficiency} |")
    return [*lines, ""]


def is_wrong(row: Row) -> bool:
    """Tell whether a row computes something else."""
    return max((error["rms"] for error in row["error"].values()), default=0.0) > 0.05


def measured(result: Row) -> list[str]:
    """Return the tables of what was measured."""
    lines = [f"Measured on: {provenance(result)}.", ""]
    lines += ["Each cell: ms · percent of the limit (of the kernel that a peer runs on).", ""]
    for case, rows in ordered([row for row in result["rows"] if "percent_of_limit" in row]).items():
        whole = {row["ranks"]: row for row in rows if row["layout"] == "whole"}
        limits = ", ".join(
            f"{row['limit_ms']:.2f} ms on {count} ({row['limit_kernel']})" for count, row in sorted(whole.items())
        )
        lines += [f"**{TITLES[case]}**; limit {limits}", ""]
        lines += grid([row for row in rows if row["layout"] != "whole"], measured_cell)
    lines += failures(result) + train_table(result) + auto_table(result) + target_table(result)
    if result["left_out"]:
        lines += ["Left out for lack of time: " + "; ".join(result["left_out"]) + ".", ""]
    return lines


def measured_cell(row: Row) -> str:
    """Return the time of a row and what part of the limit it reaches."""
    own = row.get("percent_of_own_kernel", 0)
    of_own = f" ({own:.0f}%)" if row["system"] != "cpcompile" and own else ""
    return f"{row['total_ms']:.2f} · {row['percent_of_limit']:.0f}%{of_own}" + (" WRONG" if is_wrong(row) else "")


def provenance(result: Row) -> str:
    """Return what a result depends on."""
    runs = ", ".join(str(ranks) for ranks in sorted({run["ranks"] for run in result["runs"]}))
    peers = ", ".join(f"{name} {version}" for name, version in result.get("peers", {}).items())
    names = ("torch", "cuda", "cudnn", "nccl")
    versions = ", ".join(f"{name} {result[name]}" for name in names if result.get(name))
    scale = f"lengths divided by {result['scale']}" if result["scale"] > 1 else ""
    device = f"{result.get('device') or 'unknown'}, runs on {runs} of them"
    return "; ".join(filter(None, (device, versions, f"commit {result['commit'] or 'not recorded'}", peers, scale)))


def failures(result: Row) -> list[str]:
    """Return the rows that failed."""
    lines = [
        f"- {row['ranks']} GPUs, {row['case']}, {row['key']}: {row['failure'].splitlines()[0][:160]}"
        for row in result["rows"]
        if "failure" in row
    ]
    return ["Failed:", "", *lines, ""] if lines else []


def train_table(result: Row) -> list[str]:
    """Return the training steps."""
    if not result["train"]:
        return ["**Training step**: not measured.", ""]
    lines = ["**Training step of the 1B model**", ""]
    lines.append(
        "| GPUs | tokens | attention | ms | tokens/s | TFLOP/s a GPU | weak scaling | of one GPU on the same tokens "
        "| predicted ms | measured / predicted | peak GiB |"
    )
    lines.append("|---" * 11 + "|")
    for row in sorted(result["train"], key=lambda row: (row["ranks"], row["length"])):
        cells = [row["ranks"], row["length"], row["pick"], row["ms"], row["tokens_per_second"], row["tflops_per_gpu"]]
        cells += [
            f"{100 * row[name]:.1f}%" if name in row else "" for name in ("efficiency", "efficiency_of_equal_work")
        ]
        cells += [row["predicted_ms"], row["measured_over_predicted"], row["peak_gib"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def auto_table(result: Row) -> list[str]:
    """Return what `auto` picks, beside the best row."""
    lines = ["**What `auto` picks**", "", "| case | GPUs | picked | ms | best | ms | within 5% |", "|---" * 7 + "|"]
    for row in sorted(result["auto"], key=lambda row: row["ranks"]):
        verdict = {True: "yes", False: "no", None: "not measured"}[row.get("is_within_5_percent")]
        cells = [row["case"], row["ranks"], row["pick"], row.get("ms", ""), row.get("best", ""), row.get("best_ms", "")]
        lines.append(f"| {' | '.join(map(str, cells))} | {verdict} |")
    return [*lines, ""]


def target_table(result: Row) -> list[str]:
    """Return which targets are met, at the most GPUs measured."""
    ranks = max((row["ranks"] for row in result["rows"]), default=0)
    lines = [f"**Targets**, which are for 8 GPUs and 64k tokens and above; here on {ranks}", ""]
    lines += ["| case | best | percent of the limit | target | met | ring-flash-attn, published |", "|---" * 6 + "|"]
    for case, rows in ordered(result["rows"]).items():
        least, strategies = TARGETS.get(case.split("_")[0], (0, ()))
        found = [r for r in rows if r["ranks"] == ranks and r["system"] == "cpcompile" and "percent_of_limit" in r]
        found = [r for r in found if r["strategy"].split()[0] in strategies]
        if not found:
            continue
        best = max(found, key=lambda row: row["percent_of_limit"])
        met = "yes" if best["percent_of_limit"] >= least else "no"
        value = f"{best['percent_of_limit']:.1f}%"
        lines.append(
            f"| {TITLES[case]} | {label(best)} | {value} | {least}% | {met} | {PUBLISHED[case.split('_')[0]]} |"
        )
    steps = [row for row in result["train"] if row["ranks"] == ranks and "efficiency" in row]
    if steps:
        value, met = f"{100 * steps[0]['efficiency']:.1f}%", 100 * steps[0]["efficiency"] >= TRAIN_TARGET
        lines.append(f"| training step | {steps[0]['pick']} | {value} | {TRAIN_TARGET}% | {'yes' if met else 'no'} | |")
    compared = [row["is_within_5_percent"] for row in result["auto"] if "is_within_5_percent" in row]
    within, all_met = f"{sum(compared)} of {len(compared)} within 5%", bool(compared) and all(compared)
    return [*lines, f"| `auto`, on all numbers of GPUs | | {within} | all | {'yes' if all_met else 'no'} | |", ""]


def compared(result: Row) -> list[str]:
    """Return where predictions were wrong: the median of measured over predicted, of times and of what is lost to the limit."""
    rows = [row for row in result["rows"] if "measured_over_predicted" in row]
    if not rows:
        return ["No attention was measured in this run; what other runs and one GPU showed is said above.", ""]
    lines = ["Each cell: measured over predicted · percentage points of the limit measured minus predicted.", ""]
    for case, found in ordered(rows).items():
        lines += [f"**{TITLES[case]}**", ""]
        lines += grid(found, compared_cell)
    ratios: dict[str, list[float]] = {}
    for row in rows:
        ratios.setdefault(f"{row['strategy'].split()[0]}, {row['case'].split('_')[0]}", []).append(
            row["measured_over_predicted"]
        )
    lines += [
        "**Measured over predicted, all cases and GPUs**",
        "",
        "| | rows | least | median | most |",
        "|---" * 5 + "|",
    ]
    for name, values in sorted(ratios.items()):
        cells = [str(len(values)), *(f"{f(values):.3f}" for f in (min, statistics.median, max))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", *rates(result)]


def rates(result: Row) -> list[str]:
    """Return the rates of the kernels alone, of which the model has a constant and a slope for short rows."""
    lines = ["**Kernels alone, TFLOP/s**", "", "| case | tokens | kernel | forward | backward |", "|---" * 5 + "|"]
    for row in result["rows"]:
        if row["layout"] == "whole" and "total_ms" in row:
            forward = 4 * result["head_dim"] * result["heads"] * row["area"] * row["length"] ** 2 / 1e9
            cells = [TITLES[row["case"]], row["length"], row["kernel"], f"{forward / row['forward_ms']:.0f}"]
            lines.append(f"| {' | '.join(map(str, cells))} | {2.5 * forward / row['backward_ms']:.0f} |")
    known = ", ".join(
        f"{name} {a / 1e12:.0f} and {b / 1e12:.0f}" for name, (a, b) in result["constants"]["RATES"].items()
    )
    return [*lines, "", f"The model has, forward and backward: {known}.", ""]


def one_rank(result: Row) -> list[str]:
    """Return the tables of what ranks compute, measured on one GPU."""
    what = (
        f"{result['device']}, torch {result['torch']}, cuDNN {result['cudnn']}, commit {result['commit']}. Each cell: ms of "
        "the slowest rank · percent of the limit (of the mean rank) · ms that the host takes to launch it."
    )
    lines = [what, ""]
    for case, rows in ordered([row | {"system": "cpcompile"} for row in result["rows"] if "total_ms" in row]).items():
        lines += [f"**{TITLES[case]}**", ""]
        lines += grid(sorted(rows, key=lambda row: row["ranks"]), one_rank_cell)
    return lines


def one_rank_cell(row: Row) -> str:
    """Return the time of a row's slowest rank, what part of the limit it reaches, and the host's time."""
    of_mean, host = row["percent_of_limit_mean"], row["host_ms"]
    return f"{row['total_ms']:.2f} · {row['percent_of_limit']:.0f}% ({of_mean:.0f}%) · {host:.0f}"


def compared_cell(row: Row) -> str:
    """Return how far a prediction was off."""
    points = f" · {row['percent_of_limit'] - row['predicted_percent']:+.0f}" if "percent_of_limit" in row else ""
    return f"{row['measured_over_predicted']:.3f}{points}"


# Plots


def plot(result: Row, path: Path) -> None:
    """Draw percent of the limit over ranks for each case, the training step, and predicted against measured times."""
    is_measured = result["kind"] == "measured"
    value = "percent_of_limit" if is_measured else "predicted_percent"
    by_case = ordered([row for row in result["rows"] if value in row and row.get("layout") != "whole"])
    count = len(by_case) + 1 + is_measured
    lines = -(-count // 4)
    figure, all_axes = plt.subplots(lines, 4, figsize=(19, 4.4 * lines), layout="constrained", squeeze=False)
    panels = list(all_axes.flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    for axes, (case, rows) in zip(panels, by_case.items(), strict=False):
        draw_case(axes, case, rows, value)
    draw_train(panels[len(by_case)], result)
    if is_measured:
        draw_compared(panels[count - 1], result)
    what = provenance(result) if is_measured else f"predicted for H100 at commit {result['commit']}, nothing measured"
    figure.suptitle(f"32 query and 8 key heads of 128, bfloat16, causal, forward and backward\n{what}", fontsize=9)
    figure.savefig(path, dpi=110)


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


# The document


def put(text: str, name: str, lines: list[str]) -> str:
    """Return the text with other lines between the markers of a name; a document without them has no such part."""
    begin, end = BEGIN.format(name), END.format(name)
    if begin not in text:
        return text
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    return f"{head}{begin}\n" + "\n".join(lines).rstrip("\n") + f"\n{end}{tail}"


def main() -> None:
    results = HERE / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", default=results / "scaling.json")
    parser.add_argument("--predicted", type=Path, default=results / "scaling_predicted.json")
    parser.add_argument("--one-rank", type=Path, default=results / "one_rank.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs" / "scaling.md")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "scaling.png")
    options = parser.parse_args()
    guess = json.loads(options.predicted.read_text())
    result = json.loads(options.measured.read_text()) if options.measured.exists() else None
    nothing = ["Measured on: nothing yet.", ""]
    text = put(options.docs.read_text(), "predicted", predicted(guess))
    text = put(text, "measured", measured(result) if result else nothing)
    text = put(text, "compared", compared(result or {"rows": []}))
    text = put(text, "one rank", one_rank(json.loads(options.one_rank.read_text())))
    options.docs.write_text(text)
    plot(result or guess, options.picture)


if __name__ == "__main__":
    main()
