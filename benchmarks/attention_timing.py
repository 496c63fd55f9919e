"""Times, memory, bytes sent and profiles of a runner. What is timed is the slowest rank."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from attention_cases import Problem
from attention_systems import Runner, System

from cpcompile.inspect.profile import total, union
from cpcompile.inspect.trace import ON_DEVICE

Tensor = torch.Tensor
Event = dict[str, Any]
# The device waits this long before each timed step, so that the host is ahead as it is in a training step.
AHEAD_CYCLES = 10_000_000
LONG_MS = 600.0  # steps that take longer are repeated 3 times
_ITEM_BYTES = {
    **dict.fromkeys(("BFloat16", "c10::BFloat16", "Half", "c10::Half"), 2),
    **dict.fromkeys(("Float", "float", "Int", "int"), 4),
    **dict.fromkeys(("Double", "double", "Long", "long int"), 8),
    **dict.fromkeys(("Byte", "Char", "Bool", "unsigned char"), 1),
}


def make_inputs(problem: Problem, system: System, count: int) -> list[list[Tensor]]:
    """Return `count` sets of random q, k, v and dout of the rank's tokens."""
    tokens = problem.length if system.is_limit else problem.length // problem.world_size
    sets = []
    for _ in range(count):
        tensors = [torch.randn(shape, device=problem.device, dtype=problem.dtype) for shape in problem.shapes(tokens)]
        sets.append(prepared(tensors, system))
    return sets


def prepared(tensors: list[Tensor], system: System) -> list[Tensor]:
    """Give q, k, v and dout the memory that the system asks for."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors] if system.is_head_major else tensors


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def step(runner: Runner, inputs: list[Tensor]) -> tuple[Any, Any]:
    """Run a forward and a backward."""
    saved = runner.forward(*inputs[:3])
    return saved, runner.backward(saved, inputs[3])


@dataclass(frozen=True, slots=True)
class _Clock:
    """Moments of one step: events on a device, seconds on a CPU."""

    device: torch.device

    def now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, a: Any, b: Any) -> float:
        return (b - a) * 1e3 if self.device.type == "cpu" else a.elapsed_time(b)


def timed(runner: Runner, inputs: list[Tensor], device: torch.device) -> list[float]:
    """Return milliseconds of forward, backward, both, and of the host launching both, on this rank."""
    clock = _Clock(device)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda._sleep(AHEAD_CYCLES)
    host = time.perf_counter()
    start = clock.now()
    saved = runner.forward(*inputs[:3])
    middle = clock.now()
    grads = runner.backward(saved, inputs[3])
    end = clock.now()
    host = (time.perf_counter() - host) * 1e3
    synchronize(device)
    del saved, grads
    return [clock.between(start, middle), clock.between(middle, end), clock.between(start, end), host]


def _timed_together(runner: Runner, inputs: list[Tensor], device: torch.device) -> list[float]:
    dist.barrier()
    return timed(runner, inputs, device)


def times(runner: Runner, sets: list[list[Tensor]], repeats: int, device: torch.device) -> dict[str, Any]:
    """Return the median over repeats of the slowest rank, after one warm-up for each set of inputs."""
    first = torch.tensor(
        [_timed_together(runner, inputs, device) for inputs in sets], device=device, dtype=torch.float64
    )
    dist.all_reduce(first, op=dist.ReduceOp.MAX)
    repeats = min(repeats, 3) if first[-1, 2].item() > LONG_MS else repeats
    rows = [_timed_together(runner, sets[index % len(sets)], device) for index in range(repeats)]
    slowest = torch.tensor(rows, device=device, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    columns = slowest.T.tolist()
    return {
        **medians(columns),
        "fastest_ms": round(min(columns[2]), 4),
        "slowest_ms": round(max(columns[2]), 4),
        "repeats": repeats,
    }


def medians(columns: list[list[float]]) -> dict[str, float]:
    """Return the medians of what `timed` measures, by name."""
    names = ("forward_ms", "backward_ms", "total_ms", "host_ms")
    return {name: round(statistics.median(column), 4) for name, column in zip(names, columns, strict=True)}


def peak_bytes(runner: Runner, inputs: list[Tensor], before: int, device: torch.device) -> int:
    """Return the most that one forward and backward holds on a rank, inputs included; `before` was held anyway."""
    if device.type == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = step(runner, inputs)
    torch.cuda.synchronize()
    del result
    peak = torch.tensor(torch.cuda.max_memory_allocated() - before, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak.item())


def trace(runner: Runner, inputs: list[Tensor], device: torch.device) -> list[Event]:
    """Return the events of the chrome trace of one forward and backward."""
    step(runner, inputs)
    synchronize(device)
    dist.barrier()
    return events_of(profiled(runner, inputs, device))


def profiled(runner: Runner, inputs: list[Tensor], device: torch.device) -> torch.profiler.profile:
    """Return the profile of one forward and backward of this rank."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        step(runner, inputs)
        synchronize(device)
    return profile


def events_of(profile: torch.profiler.profile) -> list[Event]:
    """Return the events of the chrome trace of a profile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _numel(dims: Any) -> int:
    return torch.Size(dims).numel() if dims and not isinstance(dims[0], list) else sum(map(_numel, dims or []))


def _message(event: Event) -> tuple[str, int] | None:
    """Return the collective of an event and the bytes of its input, or None if it is no collective."""
    name, args = event.get("name", ""), event.get("args", {})
    if name == "record_param_comms":
        size = int(args.get("In msg nelems", 0)) * _ITEM_BYTES.get(args.get("dtype", ""), 0)
        return str(args.get("Collective name", "")), size
    if name.startswith("gloo:"):
        sizes = [_numel(d) * _ITEM_BYTES.get(t, 0) for d, t in zip(args["Input Dims"], args["Input type"], strict=True)]
        return name.removeprefix("gloo:"), sum(sizes)
    return None


def bytes_sent(events: list[Event], world_size: int) -> int:
    """Return what the rank sent: through collectives, and by copies to a peer's memory."""
    total = 0.0
    others = world_size - 1
    for event in events:
        if event.get("cat") == "gpu_memcpy" and "PtoP" in event.get("name", ""):
            total += int(event.get("args", {}).get("bytes", 0))
        message = _message(event)
        if message is None:
            continue
        name, size = message
        if name == "send":
            total += size
        elif "all_to_all" in name or "alltoall" in name or "reduce_scatter" in name:
            total += size * others / world_size
        elif "all_reduce" in name or "allreduce" in name:
            total += 2 * size * others / world_size
        elif "gather" in name:
            total += size * others
    return round(total)


def _is_transfer(event: Event) -> bool:
    return "nccl" in event["name"].lower() or "PtoP" in event["name"]


def _table(title: str, events: list[Event], limit: int) -> list[str]:
    by_name: dict[str, list[float]] = {}
    for event in events:
        by_name.setdefault(event["name"], []).append(event["dur"])
    lines = [f"{title}: ms, calls, name"]
    for name, durations in sorted(by_name.items(), key=lambda item: -sum(item[1]))[:limit]:
        lines.append(f"  {sum(durations) / 1e3:9.3f} {len(durations):4d}  {name[:150]}")
    return lines


def summary(events: list[Event], limit: int = 14) -> str:
    """Return where the time of a step went on this rank: kernels by time, transfers, and gaps without computation."""
    device = [e for e in events if e.get("cat") in ON_DEVICE]
    if not device:
        return "\n".join(_table("operators", [e for e in events if e.get("cat") == "cpu_op"], limit))
    computing = [e for e in device if not _is_transfer(e)]
    transfers = [e for e in device if _is_transfer(e)]
    busy, moving = (union([(e["ts"], e["ts"] + e["dur"]) for e in group]) for group in (computing, transfers))
    both = union(busy + moving)
    span = both[-1][1] - both[0][0]
    exposed = total(both) - total(busy)
    lines = [
        f"span {span / 1e3:.3f} ms: computing {total(busy) / 1e3:.3f}, transfers {total(moving) / 1e3:.3f} of which not "
        f"hidden {exposed / 1e3:.3f}, idle {(span - total(both)) / 1e3:.3f}"
    ]
    lines += _table("computing", computing, limit) + _table("transfers", transfers, 6)
    ends = {e["ts"] + e["dur"]: e["name"] for e in computing}
    starts = {e["ts"]: e["name"] for e in computing}
    gaps = sorted(((b[0] - a[1], a[1], b[0]) for a, b in pairwise(busy)), reverse=True)
    lines.append(f"gaps without computation: {len(gaps)}, {sum(gap for gap, _, _ in gaps) / 1e3:.3f} ms; the largest:")
    for gap, end, start in gaps[:8]:
        lines.append(f"  {gap / 1e3:9.3f} at {(end - both[0][0]) / 1e3:9.3f}  {ends[end][:60]} -> {starts[start][:60]}")
    return "\n".join(lines)
