"""One rank of a process group that measures: times, memory, errors, bytes sent and profiles, as lines of JSON from rank 0."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import HEAD_DIM, HEADS, KV_HEADS, Case, Problem, case_of
from attention_limits import limits
from attention_own import our_system, own_systems, pick
from attention_reference import Reference
from attention_systems import System
from attention_timing import bytes_sent, make_inputs, peak_bytes, prepared, step, summary, synchronize, times, trace
from peers import peers, versions

Row = dict[str, Any]
Item = tuple[str, str]  # a case and the key of a system
ERROR_LENGTH = 8192
HALO_SWEEP = ((32768, 4096), (65536, 2048), (65536, 4096), (65536, 8192), (131072, 4096))


def systems_of(case: Case, device: str, world_size: int) -> list[System]:
    """Return what a case measures: limits first, risky peers last."""
    found = [*limits(case.kind, device), *own_systems(case, world_size), *peers(case.kind)]
    if case.kernel:
        found = [s for s in found if s.kernel == case.kernel or (s.is_limit and device == "cpu")]
        found = [s for s in found if s.name != "yunchang" and not s.risky]
    if case.length > 65536:  # long enough that only the fastest are of interest
        found = [s for s in found if s.name in ("cpcompile", "one GPU") or s.strategy.startswith("zigzag")]
        found = [s for s in found if s.name != "yunchang"]
    return found


def system_of(case: Case, key: str, device: str) -> System:
    """Return the system of a key, whether or not `systems_of` lists it."""
    name, *parts = key.split("/", 3)
    if name == "cpcompile":
        return our_system(*parts)
    return next(system for system in (*limits(case.kind, device), *peers(case.kind)) if system.key == key)


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
        begin = time.monotonic()
        measured, failure = self.guarded(lambda: self.time(problem, system))
        if not failure:
            row |= measured
            self.clean()
            row["error"], failure = self.guarded(lambda: self.error(problem, system))
        if failure:
            row["failure"] = failure
        row["seconds"] = round(time.monotonic() - begin, 2)  # of measuring this row
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
            case = case_of(name, self.options.ranks)
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
        case = case_of(item[0], self.options.ranks)
        return case, system_of(case, item[1], self.options.device)

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
