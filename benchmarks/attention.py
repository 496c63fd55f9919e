"""Benchmark: context-parallel attention, this project's and its peers', forward and backward, beside the kernel alone.

    python benchmarks/attention.py --ranks 2 --out benchmarks/results/attention.json
    python benchmarks/plot_attention.py benchmarks/results/attention.json

One process group runs everything; a group that hangs or dies is replaced by another, which measures the limits again.
README.md beside this file says what the numbers are.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import CASES, HEAD_DIM, HEADS, KV_HEADS, Case, Problem
from attention_limits import limits
from attention_reference import Reference
from attention_systems import Autograd, Runner, System
from attention_timing import bytes_sent, make_inputs, peak_bytes, prepared, step, summary, synchronize, times, trace
from peers import peers, versions

Row = dict[str, Any]
Item = tuple[str, str]  # a case and the key of a system
ERROR_LENGTH = 8192
HALO_SWEEP = ((32768, 4096), (65536, 2048), (65536, 4096), (65536, 8192), (131072, 4096))
OURS = {  # strategies and layouts for each kind of problem
    "causal": (("ring", "zig_zag"), ("gather", "zig_zag"), ("ulysses", "contiguous")),
    "packed": (("ring", "zig_zag"), ("ring", "contiguous"), ("gather", "zig_zag"), ("ulysses", "contiguous")),
    "window": (
        ("halo", "contiguous"),
        ("halo", "zig_zag"),
        ("gather", "zig_zag"),
        ("ulysses", "contiguous"),
        ("ring", "contiguous"),
    ),
}


OUR_KERNELS = {"cuda": {"auto": "auto", "fa2": "flash"}, "cpu": {"auto": "auto", "fa2": "cpu_flash"}}


# This project, through its operators


def ours(strategy: str, q: Any, k: Any, v: Any, *, problem: Problem, layout: str, kernel: str, documents: Any) -> Any:
    """Return out `BLHD` of local q, k and v; the only place that calls the operators."""
    operator = getattr(torch.ops.cpcompile, f"{strategy}_attention").default
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    values = {
        "q": q,
        "k": k,
        "v": v,
        "mask": None,
        "documents": documents,
        "key_padding": None,
        "scale": HEAD_DIM**-0.5,
        "is_causal": True,
        "window": problem.window,
        "softcap": 0.0,
        "bounds": starts_of(problem),
        "kernel_name": OUR_KERNELS[problem.device.type][kernel],
        "length": problem.length,
        "layout": layout,
        "world_size": problem.world_size,
        "group": problem.mesh.get_group().group_name,
    }
    if strategy == "usp":
        grid = usp_grid(problem.device.type, problem.world_size)
        values["inner_size"] = grid["inner"].size()
        values["inner_group"], values["outer_group"] = (grid[x].get_group().group_name for x in ("inner", "outer"))
    names = [argument.name for argument in operator._schema.arguments]
    if kernel != "auto" and "kernel_name" not in names:
        raise NotImplementedError(f"{operator} takes no kernel")
    out, *_ = operator(**{name: values[name] for name in names if name in values})
    return out.transpose(1, 2)


@functools.cache
def usp_grid(device: str, world_size: int) -> dist.DeviceMesh:
    """Return the ranks as a grid: two neighbours exchange heads, the pairs are a ring."""
    return dist.init_device_mesh(device, (world_size // 2, 2), mesh_dim_names=("outer", "inner"))


def documents_of(problem: Problem) -> torch.Tensor | None:
    """Return the document of each token, `[1, S]`."""
    if not problem.is_packed:
        return None
    ends = torch.tensor(problem.bounds[1:], device=problem.device)
    return torch.bucketize(torch.arange(problem.length, device=problem.device), ends, right=True)[None]


def starts_of(problem: Problem) -> torch.Tensor | None:
    """Return where documents begin as the operators take it: their number, then each start, on the CPU."""
    return torch.tensor([[len(problem.documents), *problem.bounds[:-1]]]) if problem.is_packed else None


def pick(problem: Problem, kernel: str) -> tuple[str, str]:
    """Return the strategy and the layout that `auto` chooses for a model of such attentions."""
    from cpcompile import cost

    sizes = (1, HEADS, KV_HEADS, problem.length, HEAD_DIM, HEAD_DIM, problem.dtype.itemsize)
    site = cost.Attention(
        *sizes,
        problem.device.type,
        True,
        problem.window,
        False,
        has_documents=problem.is_packed,
        kernel=pick_kernel(problem, kernel),
    )
    choice = cost.choose([site], "auto", "auto", cost.Ranks(problem.world_size))
    return choice.strategies[0], choice.layout


def pick_kernel(problem: Problem, kernel: str) -> str:
    """Return the kernel that most of such an attention runs on, or the one that the case is about."""
    if kernel:
        return OUR_KERNELS["cuda"][kernel]
    return "triton" if problem.window else "cudnn"


def our_system(strategy: str, layout: str, kernel: str) -> System:
    """Return one of this project's strategies."""

    @contextmanager
    def open_(problem: Problem) -> Iterator[Runner]:
        documents = documents_of(problem)
        options: dict[str, Any] = {"layout": layout, "kernel": kernel, "documents": documents, "problem": problem}
        yield Autograd(lambda q, k, v: ours(strategy, q, k, v, **options))

    return System("cpcompile", strategy, layout, kernel, open_)


# What to measure


def systems_of(case: Case, device: str, world_size: int) -> list[System]:
    """Return what a case measures: limits first, risky peers last."""
    kernel = case.kernel or "auto"
    own = [our_system(*plan, kernel) for plan in OURS[case.kind]]
    if world_size >= 4 and case.kind != "window":
        own.append(our_system("usp", "zig_zag", kernel))
    found = [*limits(case.kind, device), *own, *peers(case.kind)]
    if case.kernel:
        found = [s for s in found if s.kernel == case.kernel or (s.is_limit and device == "cpu")]
        found = [s for s in found if s.name != "yunchang" and not s.risky]
    if case.length > 65536:  # long enough that only the fastest are of interest
        found = [s for s in found if s.name in ("cpcompile", "one GPU") or s.strategy.startswith("zigzag")]
        found = [s for s in found if s.name != "yunchang"]
    return found


def case_of(name: str) -> Case:
    """Return the case of a name."""
    return next(case for case in CASES if case.name == name)


def plan(options: argparse.Namespace) -> list[Item]:
    """Return (case, system) of every row in the order of measuring; what may hang comes last."""
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
    counted = [x for x in items if x[1].startswith("cpcompile/") and not x[0].startswith("causal")]
    asked = [x for x in items if any(pattern in "/".join(x) for pattern in options.profile)]
    return list(dict.fromkeys(counted + asked))


# One rank


class Rank:
    """One process of a group: measures rows and writes them, from rank 0, as lines of JSON."""

    def __init__(self, rank: int, options: argparse.Namespace, group: int, path: Path) -> None:
        self.options, self.group, self.path = options, group, path
        is_cuda = options.device == "cuda"
        if is_cuda:
            torch.cuda.set_device(rank)
        address = f"tcp://127.0.0.1:{options.port + group}"
        backend = "nccl" if is_cuda else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=options.ranks)
        self.rank = rank
        self.control = dist.new_group(backend="gloo")  # a peer that fails midway leaves the other group out of step
        self.mesh = dist.init_device_mesh(options.device, (options.ranks,), mesh_dim_names=("cp",))
        self.references: dict[Problem, Reference] = {}
        self.errors: dict[tuple[Problem, str], Any] = {}

    def write(self, line: Row) -> None:
        """Append a line, from rank 0."""
        if self.rank == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def guarded(self, work: Any) -> tuple[Any, str]:
        """Return what `work` returns and the first failure of any rank, '' if there is none."""
        result, failure = None, ""
        try:
            result = work()
            synchronize(torch.device(self.options.device))
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".strip()[:400]
            if self.options.verbose:
                traceback.print_exc()
        failures: list[str] = [""] * self.options.ranks
        dist.all_gather_object(failures, failure, group=self.control)
        return result, next(filter(None, failures), "")

    def clean(self) -> None:
        """Give memory back; a device that an error left unusable ends the group."""
        gc.collect()
        if self.options.device == "cuda":
            _, failure = self.guarded(torch.cuda.empty_cache)
            if failure:
                os._exit(3)

    def measure(self, case: Case, system: System) -> Row:
        """Return a row."""
        problem = Problem.of(case, self.options.scale, self.mesh)
        row: Row = {"case": case.name, "key": system.key, "group": self.group, **describe(problem, system)}
        measured, failure = self.guarded(lambda: self.time(problem, system))
        if not failure:
            row |= measured
            self.clean()
            row["error"], failure = self.guarded(lambda: self.error(problem, system))
        if failure:
            row["failure"] = failure
        return row

    def time(self, problem: Problem, system: System) -> Row:
        """Time a problem and measure its memory."""
        device = problem.device
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        with system.open(problem) as runner:
            sets = make_inputs(problem, system, self.options.sets)
            step(runner, sets[0])
            synchronize(device)
            row = times(runner, sets, self.options.repeats, device)
            del sets[1:]
            row["peak_mib"] = round(peak_bytes(runner, sets[0], before, device) / 2**20, 1)
        return row

    def error(self, problem: Problem, system: System) -> Any:
        """Compare a short problem of the same kind with float64."""
        small = problem.at(max(ERROR_LENGTH // self.options.scale, 8 * problem.world_size))
        key = small, system.key
        if key not in self.errors:
            if small not in self.references:
                self.references.clear()  # one at a time: a reference takes GiB
                self.references[small] = Reference.of(small, seed=1)
            reference = self.references[small]
            with system.open(small) as runner:
                inputs = prepared(reference.local_inputs(system.layout), system)
                saved, grads = step(runner, inputs)
                actual = {name: x.detach() for name, x in runner.tensors(saved, grads).items()}
                self.errors[key] = reference.errors(actual, system.layout)
        return self.errors[key]

    def trace(self, case: Case, system: System, problem: Problem) -> Row:
        """Return what a row sends and, if asked for, where its time goes."""

        def work() -> Row:
            with system.open(problem) as runner:
                (inputs,) = make_inputs(problem, system, 1)
                events = trace(runner, inputs, problem.device)
            sent = torch.tensor(bytes_sent(events, problem.world_size), device=problem.device)
            dist.all_reduce(sent, op=dist.ReduceOp.MAX)
            found: Row = {"bytes_sent": int(sent.item())}
            if any(pattern in f"{case.name}/{system.key}" for pattern in self.options.profile):
                found["profile"] = summary(events)
            return found

        found, failure = self.guarded(work)
        self.clean()
        return {"trace_failure": failure} if failure else found

    def run(self, items: list[Item], traces: list[Item], has_sweep: bool) -> None:
        """Measure rows, then trace some: a profiler that ran once may slow down what follows."""
        self.write({"environment": environment(self.options)})
        for name in dict.fromkeys(name for name, _ in items):
            case = case_of(name)
            picked, failure = self.guarded(lambda case=case: pick(self.problem(case), case.kernel))
            self.write({"pick": name, "choice": picked, "failure": failure})
        for item in items:
            self.write({"start": item})
            case, system = self.found(item)
            self.write({"row": self.measure(case, system)})
            self.clean()
        for item in traces:
            self.write({"start": item, "is_trace": True})
            case, system = self.found(item)
            self.write({"trace": item, "found": self.trace(case, system, self.problem(case))})
        if has_sweep:
            self.sweep()
        dist.barrier()
        dist.destroy_process_group()

    def found(self, item: Item) -> tuple[Case, System]:
        """Return the case and the system of an item."""
        case = case_of(item[0])
        systems = systems_of(case, self.options.device, self.options.ranks)
        return case, next(system for system in systems if system.key == item[1])

    def problem(self, case: Case) -> Problem:
        """Return the problem of a case."""
        return Problem.of(case, self.options.scale, self.mesh)

    def sweep(self) -> None:
        """Count what `halo` sends as window and length change."""
        system = our_system("halo", "contiguous", "auto")
        for length, window in HALO_SWEEP:
            self.write({"start": None})
            case = Case("sweep", "window", length, window=window)
            found = self.trace(case, system, self.problem(case))
            self.write({"sweep": {"length": length, "window": window, **found}})


def describe(problem: Problem, system: System) -> Row:
    """Return what identifies a row."""
    return {
        "system": system.name,
        "strategy": system.strategy,
        "layout": system.layout,
        "kernel": system.kernel,
        "ranks": problem.world_size,
        "length": problem.length,
        "documents": len(problem.documents),
        "window": problem.window,
        "area": round(problem.area, 4),
        "bound_mib": round(problem.memory_bound() / 2**20, 1),
    }


def run_rank(
    rank: int,
    options: argparse.Namespace,
    group: int,
    path: Path,
    items: list[Item],
    traces: list[Item],
    has_sweep: bool,
) -> None:
    """Be one rank of a group."""
    import cpcompile.runtime  # registers the operators

    assert cpcompile.runtime

    Rank(rank, options, group, path).run(items, traces, has_sweep)


# The process that watches


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
            elif time.monotonic() - progress > self.options.patience:
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


def environment(options: argparse.Namespace) -> Row:
    """Return what a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    is_cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or "cpu",
        "ranks": options.ranks,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if is_cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if is_cuda else None,
        "python": platform.python_version(),
        "commit": options.commit or commit.stdout.strip(),
        "peers": versions(),
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "bfloat16",
        "error_length": ERROR_LENGTH // options.scale,
        "scale": options.scale,
        "sets": options.sets,
        "command": " ".join(sys.argv),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", nargs="*", default=[], help="parts of the names of cases; all by default")
    parser.add_argument(
        "--systems", nargs="*", default=[], help="parts of system/strategy/layout/kernel; all by default"
    )
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
