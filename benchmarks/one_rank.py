"""One rank: what each rank of a context-parallel attention computes, measured rank by rank on one device.

    python benchmarks/one_rank.py --out benchmarks/results/one_rank.json                       # on one GPU
    python benchmarks/one_rank.py --profile causal_64k/8/ring/zig_zag/7                        # where a rank's time goes
    python benchmarks/one_rank.py --device cpu --scale 64 --repeats 1 --out /tmp/one_rank.json # to try it out

Kernels, merges, copies and the host are those of a rank of a job; only the links and the other ranks are missing. Streams and
events are those of symmetric memory, without its barriers. A message lies in memory of the same device and stands for those of
all ranks, so that a fetch has its true size, and costs memory bandwidth of one GPU (and multiprocessors, where the driver copies
with these) in place of a link. So the part of the limit that is reached here is what links can at best leave of it. Values are
random; nothing is checked.

README.md beside this file says what the numbers are.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, Case, Problem, case_of
from attention_limits import limits
from attention_own import our_system, site_of, usp_grid
from attention_systems import Runner, System
from attention_timing import events_of, make_inputs, medians, profiled, step, summary, synchronize, timed
from lone_rank import as_rank
from scaling_plan import FLASH2_TIMES, area_of, kernel_seconds, plans_of, prediction

import cpcompile.runtime  # registers the operators
from cpcompile.choose import cost
from cpcompile.choose.attention import Ranks

assert cpcompile.runtime

Row = dict[str, Any]
Tensors = list[torch.Tensor]
# In the order of measuring: what is fast and least known first.
CASES = (
    "packed_64k_random_16",
    "packed_8k_a_gpu",
    "causal_8k_a_gpu",
    "window_4k_of_64k",
    "causal_64k",
    "causal_128k",
)
SETS = 2  # of random inputs, that the repeats go around
LONG_MS, REPEATS_OF_LONG = 150.0, 3
WARM_UP = 2
# Seconds, for the estimate: until Triton has compiled its kernels, and of measuring a rank, besides its steps. That is mostly
# cuDNN, which plans anew for each shape; documents have many.
START, RANK, PACKED_RANK = 20.0, 0.3, 0.5


@dataclass(frozen=True, slots=True)
class Item:
    """One row: `plan` is strategy/layout, as in `scaling_plan`."""

    case: Case
    ranks: int
    plan: str

    @property
    def name(self) -> str:
        """How `--profile` calls it, but for the rank."""
        return f"{self.case.name}/{self.ranks}/{self.plan}"

    @property
    def inner(self) -> int:
        """How many neighbours exchange heads."""
        strategy, _, shape = self.plan.partition("/")[0].partition(" ")
        return int(shape.partition("x")[2]) if shape else self.ranks if strategy == "ulysses" else 1

    def measured_ranks(self, which: str) -> list[int]:
        """Return the ranks to measure.

        `few`: of those that exchange heads, which compute the same tokens, the first; of others the first, the middle and the
        last, and all where documents make each a case of its own.
        """
        if which == "all":
            return list(range(self.ranks))
        places = list(range(0, self.ranks, self.inner))
        return places if self.case.documents else sorted({places[0], places[len(places) // 2], places[-1]})


def items_of(cases: Sequence[str], ranks: Sequence[int], strategies: Sequence[str]) -> list[Item]:
    """Return the rows in the order of measuring, a case that is another one at so many ranks once."""
    found: dict[tuple[Any, ...], Item] = {}
    for name in cases:
        for size in ranks:
            case = case_of(name, size)
            for plan in plans_of(case, size):
                if not strategies or any(part in plan for part in strategies):
                    found.setdefault((case.length, case.documents, case.window, size, plan), Item(case, size, plan))
    return list(found.values())


# Measuring


@contextmanager
def rank_of(case: Case, ranks: int, rank: int, options: argparse.Namespace) -> Iterator[Problem]:
    """Be a rank of the problem."""
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    with as_rank(rank, ranks):
        try:
            # A mesh of a device type would choose the device by the rank.
            mesh = dist.init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
            yield Problem.of(case, options.scale, mesh, device)
        finally:
            usp_grid.cache_clear()


@contextmanager
def opened(problem: Problem, system: System) -> Iterator[tuple[Runner, list[Tensors]]]:
    """Open a system that has run once, with its inputs."""
    with system.open(problem) as runner:
        sets = make_inputs(problem, system, SETS)
        step(runner, sets[0])
        synchronize(problem.device)
        yield runner, sets


def measured(problem: Problem, system: System, repeats: int) -> Row:
    """Return the median times of this rank, in ms."""
    with opened(problem, system) as (runner, sets):
        last = timed(runner, sets[-1], problem.device)
        repeats = min(repeats, REPEATS_OF_LONG) if last[2] > LONG_MS else repeats
        rows = [timed(runner, sets[index % SETS], problem.device) for index in range(repeats)]
    return medians([list(column) for column in zip(*rows, strict=True)])


def guarded(work: Any) -> Row:
    """Return what work returns, or its failure; a case that does not fit should not end the others."""
    try:
        return work()
    except Exception as error:
        failure = {"failure": f"{type(error).__name__}: {error}".strip()[:400]}
    gc.collect()
    torch.cuda.empty_cache()
    return failure


def limit_systems(case: Case, device: str) -> list[System]:
    """Return the kernels that the limit is the fastest of; FlashAttention 2 is never, where cuDNN computes all in one call."""
    return [s for s in limits(case.kind, device) if case.kind != "causal" or s.kernel != "fa2"]


def limit_rows(case: Case, ranks: int, options: argparse.Namespace) -> list[Row]:
    """Measure the kernels alone on the whole problem."""
    found = []
    with rank_of(case, ranks, 0, options) as problem:
        for system in limit_systems(case, options.device):
            row = guarded(lambda system=system: measured(problem, system, options.repeats))
            row = {
                "case": case.name,
                "length": problem.length,
                "bounds": problem.bounds,
                "kernel": system.kernel,
                **row,
            }
            found.append(row)
            print(f"{case.name:24s} limit {system.kernel:30s} {times_of(row)}", flush=True)
    return found


def measured_item(item: Item, options: argparse.Namespace) -> Row:
    """Measure the ranks of a row."""
    system = our_system(*item.plan.split("/"), options.kernel)
    each = {}
    for rank in item.measured_ranks(options.ranks_of):
        with rank_of(item.case, item.ranks, rank, options) as problem:
            each[rank] = guarded(lambda problem=problem: measured(problem, system, options.repeats))
    failure = next((row["failure"] for row in each.values() if "failure" in row), "")
    return {"per_rank": each} | ({"failure": failure} if failure else slowest(each))


def slowest(each: dict[int, Row]) -> Row:
    """Return the times of the slowest rank, for each measure the slowest in it, and the mean over ranks."""
    found = {name: max(row[name] for row in each.values()) for name in next(iter(each.values()))}
    found["slowest_rank"] = max(each, key=lambda rank: each[rank]["total_ms"])
    return found | {"mean_ms": round(fmean(row["total_ms"] for row in each.values()), 4)}


def compared(row: Row, item: Item, alone: list[Row]) -> Row:
    """Return the row with the limit and with what the cost model says, of the whole and of the computation alone."""
    found = row | prediction(item.case.name, item.ranks, f"cpcompile/{item.plan}/auto")
    found["predicted_compute_ms"] = round(1e3 * compute_seconds(item), 4)
    alone = [x for x in alone if "failure" not in x]
    if "failure" in row or not alone:
        return found
    best = min(alone, key=lambda x: x["total_ms"])
    limit, forward = best["total_ms"] / item.ranks, best["forward_ms"] / item.ranks
    return found | {
        "limit_ms": round(limit, 4),
        "limit_forward_ms": round(forward, 4),
        "limit_kernel": best["kernel"],
        "percent_of_limit": round(100 * limit / row["total_ms"], 2),
        "percent_of_limit_forward": round(100 * forward / row["forward_ms"], 2),
        "percent_of_limit_mean": round(100 * limit / row["mean_ms"], 2),
        "measured_over_predicted_compute": round(row["total_ms"] / found["predicted_compute_ms"], 3),
    }


def compute_seconds(item: Item) -> float:
    """Return what the cost model says of the kernels of the slowest rank, without what messages add."""
    strategy, layout = item.plan.split("/")
    name, case = strategy.partition(" ")[0], item.case
    axis = Ranks(item.ranks, item.inner if name == "usp" else 0)
    site = site_of(case.length, case.window, bool(case.documents), case.kernel, "cuda")
    return cost.compute_seconds(site, site.workload(axis, layout), name) * area_of(case, item.ranks)


# The estimate


def steps_seconds(seconds: float, repeats: int) -> float:
    """Return how long the steps of one measurement take."""
    return seconds * (WARM_UP + (repeats if 1e3 * seconds < LONG_MS else min(repeats, REPEATS_OF_LONG)))


def item_seconds(item: Item, options: argparse.Namespace) -> float:
    """Return how long a row takes to measure on H100."""
    rank = PACKED_RANK if item.case.documents else RANK
    return len(item.measured_ranks(options.ranks_of)) * (rank + steps_seconds(compute_seconds(item), options.repeats))


def limit_seconds(case: Case, options: argparse.Namespace) -> float:
    """Return how long the kernels of the limit take to measure on H100."""
    whole, found = kernel_seconds(case), 0.0
    for system in limit_systems(case, "cuda"):
        slower = FLASH2_TIMES if system.kernel.startswith("fa2") and not case.window else 1.0
        found += RANK + steps_seconds(whole * slower, options.repeats)
    return found


def limit_key(case: Case) -> tuple[Any, ...]:
    """Return what a limit depends on; the cuts between documents do not depend on the ranks, up to 8."""
    return case.length, case.documents, case.window


# The run


class Run:
    """Measures rows, and writes all that there are after each."""

    def __init__(self, options: argparse.Namespace, items: list[Item]) -> None:
        """Measure nothing yet."""
        self.options, self.items, self.began = options, items, time.monotonic()
        self.limits: dict[tuple[Any, ...], list[Row]] = {}
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.estimate = START

    def seconds_of(self, item: Item) -> float:
        """Return how long a row takes, with its limit where that is not known."""
        known = limit_key(item.case) in self.limits
        return item_seconds(item, self.options) + (0.0 if known else limit_seconds(item.case, self.options))

    def run(self) -> None:
        """Measure all that the budget allows."""
        cases = {limit_key(item.case): item.case for item in self.items}
        self.estimate += sum(item_seconds(item, self.options) for item in self.items)
        self.estimate += sum(limit_seconds(case, self.options) for case in cases.values())
        ranks = sum(len(item.measured_ranks(self.options.ranks_of)) for item in self.items)
        print(
            f"{len(self.items)} rows of {ranks} ranks, {len(cases)} limits: about {self.estimate:.0f} s on one H100",
            flush=True,
        )
        for item in self.items:
            if time.monotonic() - self.began + self.seconds_of(item) > self.options.budget:
                self.left_out.append(item.name)
                print(f"{item.name} is left out: the budget is spent", flush=True)
            else:
                self.measure(item)
            self.save()

    def measure(self, item: Item) -> None:
        """Measure a row, and the limit of its case if it is the first."""
        key, began = limit_key(item.case), time.monotonic()
        if key not in self.limits:
            if self.options.device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()  # of another length
            self.limits[key] = limit_rows(item.case, item.ranks, self.options)
            began = time.monotonic()
        strategy, layout = item.plan.split("/")
        head = {"case": item.case.name, "ranks": item.ranks, "strategy": strategy, "layout": layout}
        row = compared(measured_item(item, self.options), item, self.limits[key])
        self.rows.append({**head, "kernel": self.options.kernel, **row, "seconds": round(time.monotonic() - began, 2)})
        print(line_of(self.rows[-1]), flush=True)

    def save(self) -> None:
        """Write what there is."""
        if self.options.out is None:
            return
        taken = {"estimated_seconds": round(self.estimate, 1), "seconds": round(time.monotonic() - self.began, 1)}
        limits_found = [row for rows in self.limits.values() for row in rows]
        found = {**about(self.options), **taken, "left_out": self.left_out, "limits": limits_found, "rows": self.rows}
        self.options.out.parent.mkdir(parents=True, exist_ok=True)
        self.options.out.write_text(json.dumps(found, indent=1) + "\n")


def times_of(row: Row) -> str:
    """Return the times of a row for the log."""
    if "failure" in row:
        return row["failure"].splitlines()[0][:110]
    return f"{row['forward_ms']:9.3f} {row['total_ms']:9.3f} ms, host {row['host_ms']:6.2f}"


def line_of(row: Row) -> str:
    """Return a row for the log."""
    head = f"{row['case']:24s} {row['ranks']} {row['strategy'] + '/' + row['layout']:28s} {times_of(row)}"
    if "percent_of_limit" not in row:
        return head
    return (
        f"{head}, rank {row['slowest_rank']}, {row['percent_of_limit']:6.1f}% of the limit (mean rank "
        f"{row['percent_of_limit_mean']:.1f}%); predicted {row['predicted_compute_ms']:.3f} ms, with links "
        f"{row['predicted_ms']:.3f} ms, {row['predicted_percent']:.1f}%"
    )


def profile(name: str, options: argparse.Namespace) -> None:
    """Print where the time of case/P/strategy/layout/rank goes."""
    case_name, ranks, strategy, layout, rank = name.split("/")
    case, system = case_of(case_name, int(ranks)), our_system(strategy, layout, options.kernel)
    with (
        rank_of(case, int(ranks), int(rank), options) as problem,
        opened(problem, system) as (runner, sets),
    ):
        timed(runner, sets[-1], problem.device)
        found = profiled(runner, sets[0], problem.device)
    by = "self_device_time_total" if options.device == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=by, row_limit=30, max_name_column_width=100))
    print(summary(events_of(found)))


def about(options: argparse.Namespace) -> Row:
    """Return what a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    is_cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "python": platform.python_version(),
        "commit": options.commit or commit.stdout.strip(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "scale": options.scale,
        "repeats": options.repeats,
        "ranks_of": options.ranks_of,
        "command": " ".join(sys.argv),
    }


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="in the order of measuring")
    parser.add_argument("--ranks", nargs="*", type=int, default=(2, 4, 8))
    parser.add_argument("--strategies", nargs="*", default=(), help="parts of strategy/layout; all by default")
    parser.add_argument("--ranks-of", choices=("few", "all"), default="few", help="which ranks of each row")
    parser.add_argument("--kernel", default="auto", help="of the strategies; the limit is the fastest in any case")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=280.0, help="seconds for everything")
    parser.add_argument(
        "--profile", metavar="CASE/P/STRATEGY/LAYOUT/RANK", help="print where a rank's time goes instead"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=int, default=1, help="divide all lengths by this, to try the benchmark out")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write what was measured."""
    options = parsed(arguments)
    if options.device == "cuda":
        torch.cuda.set_device(0)
    if options.profile:
        profile(options.profile, options)
    else:
        Run(options, items_of(options.cases, options.ranks, options.strategies)).run()


if __name__ == "__main__":
    main()
