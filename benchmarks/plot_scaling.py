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

from cpcompile.inspect.plots.scaling import (
    TARGETS,
    TITLES,
    TRAIN_TARGET,
    Row,
    label,
    ordered,
    plot_scaling,
    provenance,
)

HERE = Path(__file__).parent
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
PUBLISHED = {"causal": "90%", "packed": "58 to 76%"}  # of its kernel, by its README, on 8 GPUs


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
    plot_scaling(result or guess, options.picture)


if __name__ == "__main__":
    main()
