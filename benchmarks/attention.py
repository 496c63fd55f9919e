"""Benchmark: context-parallel attention, this project's and its peers', forward and backward, beside the kernel alone.

    python benchmarks/attention.py --ranks 2 --out benchmarks/results/attention.json
    python benchmarks/plot_attention.py benchmarks/results/attention.json

One process group runs everything (attention_rank.py); this process watches it and collects its rows. A group that hangs or
dies is replaced by another, which measures the limits again.
README.md beside this file says what the numbers are.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from attention_cases import CASES
from attention_rank import Item, Row, run_rank, systems_of

START = 60.0  # seconds that a group may take besides, until it has imported everything


def plan(options: argparse.Namespace) -> list[Item]:
    """Return (case, system) of every row in the order of measuring; what may hang comes last."""
    if options.plan:
        return [(case, key) for case, key in json.loads(options.plan.read_text())]
    items: list[tuple[bool, str, str]] = []
    for case in CASES:
        if options.cases and not any(name in case.name for name in options.cases):
            continue
        for system in systems_of(case, options.device, options.ranks):
            if system.is_limit or not options.systems or any(name in system.key for name in options.systems):
                items.append((system.risky, case.name, system.key))
    return [(case, key) for _, case, key in sorted(items, key=lambda item: item[0])]


def traces_of(options: argparse.Namespace, items: list[Item]) -> list[Item]:
    """Return the rows to trace: to count what they send, or to profile them."""
    if options.plan:
        return []
    counted = [x for x in items if x[1].startswith("cpcompile/") and not x[0].startswith("causal")]
    asked = [x for x in items if any(pattern in "/".join(x) for pattern in options.profile)]
    return list(dict.fromkeys(counted + asked))


class Watch:
    """Starts groups of ranks, collects their rows, and replaces a group that stands still or dies."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: dict[tuple[str, str, int], Row] = {}
        self.done: set[Item] = set()
        self.traced: set[Item] = set()
        self.extra: dict[str, Any] = {"environment": {}, "picks": {}, "sweep": [], "groups": 0}
        self.current: Row = {}
        self.begin = time.monotonic()

    def run(self) -> None:
        """Run groups until every row is there."""
        items = plan(self.options)
        traces = traces_of(self.options, items)
        print(f"{len(items)} rows", flush=True)
        for group in range(6):
            todo = [item for item in items if item not in self.done]
            untraced = [item for item in traces if item not in self.traced]
            if not (todo or untraced) or self.seconds_left() < 30:
                break
            cases = {case for case, _ in todo}
            again = [x for x in items if "/whole/" in x[1] and x[0] in cases and x not in todo]
            if not self.run_group(group, again + todo, untraced):
                break
        self.save()

    def seconds_left(self) -> float:
        """Return the rest of the time budget."""
        return self.options.budget - (time.monotonic() - self.begin)

    def run_group(self, group: int, items: list[Item], traces: list[Item]) -> bool:
        """Run one group to its end; tell whether another may get further."""
        path = self.options.out.with_suffix(f".{group}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        spawn = multiprocessing.get_context("spawn")
        has_sweep = not self.extra["sweep"] and any(case.startswith("window") for case, _ in traces)
        work = (self.options, group, path, items, traces, has_sweep)
        processes = [
            spawn.Process(target=run_rank, args=(rank, *work), daemon=True) for rank in range(self.options.ranks)
        ]
        for process in processes:
            process.start()
        self.extra["groups"] = group + 1
        self.current, before = {}, len(self.done) + len(self.traced)
        progress, position, ended = time.monotonic(), 0, ""
        while not ended:
            time.sleep(0.2)
            is_over = not any(process.is_alive() for process in processes)
            lines = path.read_text()[position:]
            complete = lines[: lines.rfind("\n") + 1]
            position += len(complete)
            for line in complete.splitlines():
                self.take(json.loads(line))
                progress = time.monotonic()
            codes = [process.exitcode for process in processes]
            if is_over and not any(codes):
                ended = "finished"
            elif any(codes):
                ended = f"a process ended with exit code {next(filter(None, codes))}"
            elif time.monotonic() - progress > self.options.patience + (0 if position else START):
                ended = f"nothing happened for {self.options.patience} s"
            elif self.seconds_left() < 0:
                ended = "the time budget was spent"
        for process in processes:
            process.kill()
            process.join()
        path.unlink()
        if ended == "finished":
            return False
        print(f"group {group}: {ended}", flush=True)
        self.extra.setdefault("ends", []).append(f"group {group}: {ended}")
        if self.current.get("start"):
            self.fail(group, ended)
        return len(self.done) + len(self.traced) > before

    def fail(self, group: int, reason: str) -> None:
        """Record what was going on when a group ended."""
        case, key = self.current["start"]
        if self.current.get("is_trace"):
            self.take({"trace": [case, key], "found": {"trace_failure": reason}})
            return
        system, strategy, layout, kernel = key.split("/", 3)
        row = {"case": case, "key": key, "system": system, "strategy": strategy, "layout": layout, "kernel": kernel}
        self.take({"row": {**row, "group": group, "ranks": self.options.ranks, "failure": reason}})

    def take(self, line: Row) -> None:
        """Take a line that rank 0 wrote."""
        match line:
            case {"start": _}:
                self.current = line
            case {"row": row}:
                self.current = {}
                self.done.add((row["case"], row["key"]))
                self.rows[row["case"], row["key"], row["group"]] = row
                print(progress_line(row), flush=True)
                self.save()
            case {"trace": [case, key], "found": found}:
                self.current = {}
                self.traced.add((case, key))
                for (case_, key_, _), row in self.rows.items():
                    if (case_, key_) == (case, key):
                        row |= found
            case {"sweep": found}:
                self.extra["sweep"].append(found)
            case {"pick": name, "choice": choice, "failure": failure}:
                self.extra["picks"][name] = choice or failure
            case {"environment": found}:
                self.extra["environment"] = found

    def save(self) -> None:
        """Write all rows with what compares them."""
        rows = [dict(row) for row in self.rows.values()]
        compare(rows)
        autos = [auto_row(name, choice, rows) for name, choice in self.extra["picks"].items()]
        extra = {key: value for key, value in self.extra.items() if key not in ("environment", "picks")}
        result = {**self.extra["environment"], **extra, "auto": autos, "rows": rows}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(result, indent=1) + "\n")


def progress_line(row: Row) -> str:
    """Return a row for the log."""
    head = f"{row['case']:24s} {row['key']:64s} "
    if "failure" in row:
        return head + row["failure"].splitlines()[0][:110]
    worst = max(error["rms"] for error in row["error"].values())
    return (
        head
        + f"{row['forward_ms']:9.2f} {row['backward_ms']:9.2f} {row['total_ms']:9.2f} ms {row['peak_mib']:8.0f} MiB {worst:.2e}"
    )


def compare(rows: list[Row]) -> None:
    """Add to each row the limit of its case and group, and its error over that of a single kernel."""
    for row in rows:
        alone = [r for r in rows if r["case"] == row["case"] and r["layout"] == "whole" and "failure" not in r]
        alone = [r for r in alone if r["group"] == row["group"]] or alone
        if "failure" in row or not alone:
            continue
        best = min(alone, key=lambda r: r["total_ms"])
        row["limit_ms"] = round(best["total_ms"] / row["ranks"], 4)
        row["limit_kernel"] = best["kernel"]
        row["ratio_to_limit"] = round(
            row["total_ms"] / (row["ranks"] if row["layout"] == "whole" else 1) / row["limit_ms"], 4
        )
        same = [r for r in alone if r["kernel"].split()[0] == row["kernel"]] or [best]
        for measure in ("rms", "max"):
            ratios = [row["error"][x][measure] / max(same[0]["error"][x][measure], 1e-30) for x in row["error"]]
            row[f"error_ratio_{measure}"] = round(max(ratios), 3)


def auto_row(name: str, choice: Any, rows: list[Row]) -> Row:
    """Return how what `auto` picks compares with the best strategy measured."""
    own = [r for r in rows if r["case"] == name and r["system"] == "cpcompile" and "failure" not in r]
    row: Row = {"case": name, "pick": choice}
    picked = [r for r in own if [r["strategy"], r["layout"]] == choice]
    if own and picked:
        best = min(own, key=lambda r: r["total_ms"])
        row |= {
            "total_ms": picked[0]["total_ms"],
            "best": [best["strategy"], best["layout"]],
            "best_ms": best["total_ms"],
        }
        row["is_within_5_percent"] = picked[0]["total_ms"] <= 1.05 * best["total_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=[], help="parts of the names of cases; all by default")
    parser.add_argument(
        "--systems", nargs="*", default=[], help="parts of system/strategy/layout/kernel; all by default"
    )
    parser.add_argument("--plan", type=Path, help="JSON with the rows to measure, in this order: [[case, key], ...]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sets", type=int, default=2, help="sets of random inputs that the repeats go around")
    parser.add_argument(
        "--profile", nargs="*", default=[], help="parts of case/system/...: also say where the time goes"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this, to try the benchmark out")
    parser.add_argument("--patience", type=float, default=100.0, help="seconds without a row before a group is ended")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--port", type=int, default=0, help="of the first process group; 0: a free one")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--verbose", action="store_true", help="print the traceback of every failure")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attention.json"))
    options = parser.parse_args()
    if not options.port:  # several runs may share a host
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            options.port = free.getsockname()[1]
    Watch(options).run()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
