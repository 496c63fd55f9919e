"""Host time: what launching one context-parallel attention, forward and backward, costs the process that launches it.

No kernel computes and no byte travels: the one kernel returns empty tensors, all ranks read memory of this process, and
tensors are a 64th of the sequence with heads of 2. What is left is the host: schedule, views, copies to launch, autograd.

    python benchmarks/host_time.py --out benchmarks/results/host_time.json
    python benchmarks/host_time.py --cases ring/2 --profile
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would speak of each start

import torch
import torch.distributed as dist
from attention_cases import DOCUMENT_SETS, HEADS, KV_HEADS, usp_layout
from lone_rank import OnCpu, as_rank

import cpcompile.runtime
from cpcompile.runtime import kernels
from cpcompile.runtime.attention import key_needs, partial_results
from cpcompile.runtime.kernels.case import FEATURES, Case, Kernel

Tensor = torch.Tensor
SCALE = 64  # a document is as long a part of the sequence as in the measurements of attention itself
LENGTH = 65536 // SCALE
HEAD_DIM = 2
WARM_UP = 5
BATCHES = 9
counts: Counter[str] = Counter()
Results = tuple[Tensor, ...]
Backward = Callable[[Results], Results]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table; `documents` names a set of `attention_cases`, '' is one causal sequence."""

    strategy: str
    world_size: int
    documents: str = ""

    @property
    def name(self) -> str:
        """How `--cases` calls it."""
        return "/".join((self.strategy, str(self.world_size), *filter(None, (self.documents,))))

    @property
    def inner(self) -> int:
        """How many ranks exchange heads in USP."""
        return 2 if self.world_size == 4 else 4

    @property
    def layout(self) -> str:
        """The layout that the strategy is fastest with."""
        if self.strategy == "ulysses":
            return "contiguous"
        if self.strategy == "usp":
            return usp_layout(bool(self.documents), self.inner)
        return "balanced" if self.documents else "zig_zag"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured, of the slowest rank; counts are of forward and backward together.

    Attributes:
        host_ms, forward_ms: the fastest of the repeats, of forward and backward, and its forward.
        plan_ms: what the first attention of a batch with other documents takes more, for all layers of a model.
        kernel_calls, merges: blocks that kernels compute, and partial results that are merged or added.
        copies: copies and fills, those that fetch from other ranks included.
        beside: barriers and batches of copies on the side stream.
    """

    name: str
    rank: int
    host_ms: float
    forward_ms: float
    plan_ms: float
    kernel_calls: int
    merges: int
    copies: int
    beside: int


SETTINGS = tuple(
    Setting(strategy, world_size, documents)
    for strategy in ("ring", "gather", "ulysses", "usp")
    for world_size in (2, 4, 8)
    for documents in ("", "random_16")
    if strategy != "usp" or world_size > 2
)


def forward(q: Tensor, k: Tensor, v: Tensor, block: object) -> tuple[Tensor, Tensor]:
    """Return results as kernels of FlashAttention lay them, without computing them."""
    counts["kernel"] += 1
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients, without computing them."""
    counts["kernel"] += 1
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _no_limits(case: Case) -> str:
    return ""


class Counting(OnCpu):
    """A rank that counts what it does on the stream beside."""

    def aside(self, work: Callable[[], None]) -> OnCpu:
        """Work at once."""
        counts["aside"] += 1
        return super().aside(work)


def without_devices() -> None:
    """Take the kernels, the merges and the bytes out of the runtime, and let gaps be as short as the documents are."""

    def merge(*_: Tensor) -> None:
        counts["merge"] += 1

    kernels.KERNELS = (Kernel("none", forward, backward, _no_limits, FEATURES),)
    partial_results.merge_ = partial_results.add_ = merge  # type: ignore[assignment]
    key_needs.GAP = key_needs.GAP * LENGTH // DOCUMENT_SETS["random_16"][-1]


def groups_of(rank: int, world_size: int, inner: int) -> tuple[str, ...]:
    """Return the names of the group of a rank and of its inner and outer ones."""
    inner = min(inner, world_size)
    ranks = torch.arange(world_size).view(-1, inner)
    parts = [dist.new_group(group) for group in (*ranks.tolist(), *ranks.t().tolist()) if rank in group]
    return tuple(group.group_name for group in (dist.distributed_c10d._get_default_group(), *parts))


def starts_of(setting: Setting, batch: int) -> Tensor:
    """Return where the documents of a batch begin: those of the set in the first, as many elsewhere in each other."""
    ends = DOCUMENT_SETS[setting.documents]
    if batch:
        ends = (0, *sorted(random.Random(batch).sample(range(SCALE, ends[-1], SCALE), len(ends) - 2)), ends[-1])
    return torch.tensor(ends[:-1]) * LENGTH // ends[-1]


def step_of(setting: Setting, groups: tuple[str, ...], batch: int = 0) -> tuple[Callable[[], Results], Backward]:
    """Return the forward and the backward of one attention, as graphs call them."""
    size, (group, *parts) = setting.world_size, groups
    axis: dict[str, Any] = {"length": LENGTH, "layout": setting.layout, "world_size": size, "group": group}
    if setting.strategy == "usp":
        axis |= {"inner_size": setting.inner, "inner_group": parts[0], "outer_group": parts[1]}
    documents = bounds = None
    if setting.documents:
        documents = torch.bucketize(torch.arange(LENGTH), starts_of(setting, batch), right=True)[None]
        bounds = cpcompile.runtime.document_bounds(documents)
    q, k, v, dout = (
        torch.randn(1, LENGTH // size, heads, HEAD_DIM, dtype=torch.bfloat16).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    terms = None, documents, None, HEAD_DIM**-0.5, True, 0, 0.0, 0.0, -1, bounds
    forward, backward = (
        getattr(torch.ops.cpcompile, f"{setting.strategy}_attention{name}").default for name in ("", "_backward")
    )

    def differentiate(results: Results) -> Results:
        out, lse, *kept = results
        return backward(dout, q, k, v, out, lse, kept, *terms, **axis)

    return lambda: forward(q, k, v, *terms, **axis), differentiate


def plan_ms(setting: Setting, groups: tuple[str, ...]) -> float:
    """Return the median of what the first attention of a batch takes more than the next: documents are others in each."""
    if not setting.documents:
        return 0.0
    more = []
    for batch in range(1, BATCHES + 1):
        run, differentiate = step_of(setting, groups, batch)
        times = []
        for _ in range(3):
            began = time.process_time()
            differentiate(run())
            times.append(time.process_time() - began)
        more.append(times[0] - min(times[1:]))
    return 1e3 * statistics.median(more)


def measure(setting: Setting, rank: int, repeats: int) -> Row:
    """Return what one rank needs; seconds are those of the process, so that a busy machine measures the same."""
    with as_rank(rank, setting.world_size, Counting):
        groups = groups_of(rank, setting.world_size, setting.inner)
        planned = plan_ms(setting, groups)
        run, differentiate = step_of(setting, groups)
        for _ in range(WARM_UP):
            differentiate(run())
        counts.clear()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
            differentiate(run())
        copies = sum(event.name in ("aten::copy_", "aten::fill_", "aten::cat") for event in profiler.events())
        seen = Counter(counts)
        times = []
        for _ in range(repeats):
            began = time.process_time()
            out = run()
            middle = time.process_time()
            differentiate(out)
            times.append((time.process_time() - began, middle - began))
    both, forward = (1e3 * x for x in min(times))
    calls, merges, beside = (seen[name] for name in ("kernel", "merge", "aside"))
    took = (round(x, 3) for x in (both, forward, planned))
    return Row(setting.name, rank, *took, calls, merges, copies, beside)


def profile(setting: Setting, rank: int, repeats: int) -> None:
    """Print where the time of a rank goes."""
    with as_rank(rank, setting.world_size, Counting):
        run, differentiate = step_of(setting, groups_of(rank, setting.world_size, setting.inner))
        for _ in range(WARM_UP):
            differentiate(run())
        profiler = cProfile.Profile()
        profiler.enable()
        for _ in range(repeats):
            differentiate(run())
        profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def main() -> None:
    """Measure, print a table, and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="strategy/ranks or strategy/ranks/documents; default: all")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--profile", action="store_true", help="print where the time of the last rank goes instead")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    without_devices()
    rows = []
    for setting in (s for s in SETTINGS if not args.cases or s.name in args.cases):
        if args.profile:
            profile(setting, setting.world_size - 1, args.repeats)
            continue
        row = max((measure(setting, rank, args.repeats) for rank in range(setting.world_size)), key=lambda r: r.host_ms)
        rows.append(row)
        print(
            f"{row.name:24} {row.host_ms:7.2f} ms (forward {row.forward_ms:5.2f}), plan {row.plan_ms:5.2f}, rank {row.rank}: "
            f"{row.kernel_calls} kernels, {row.merges} merges, {row.copies} copies, {row.beside} beside",
            flush=True,
        )
    if args.out:
        about = {
            "device": platform.processor() or platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "length": LENGTH,
            "repeats": args.repeats,
        }
        args.out.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
