"""Documents that change: what a rank takes for an attention of a batch that it has not seen, and for the same batch again.

    python benchmarks/changing_documents.py --out benchmarks/results/changing_documents.json                 # on one GPU
    python benchmarks/changing_documents.py --device cpu --length 2048 --batches 2 --out /tmp/changing_documents.json

Each rank of a job is measured by itself, as in `one_rank.py`: its neighbours do not exist, and messages lie in memory of this
device. A batch is 16 documents of 64k tokens whose ends are random, 32 heads and 8 key heads of 64 in bfloat16. Its first
attention decides what to compute and to send, and plans kernels for sizes that are new; those of the next layers find all that.
Times are those of forward and backward with the host, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from host_time import groups_of
from lone_rank import as_rank
from train_step import installed_version, synchronize

import cpcompile.runtime
from cpcompile.runtime.kernels import cudnn_varlen

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 64
PLANS = ("ring/balanced", "gather/balanced", "ulysses/contiguous")
AGAIN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", nargs="+", default=PLANS, help="strategy/layout")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for plan in options.plans:
        of_ranks = [measure(options, plan, rank) for rank in range(options.ranks)]
        rows.append({"plan": plan, "ranks": options.ranks, **slowest(of_ranks)})
        print(json.dumps(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    about = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "packages": {name: installed_version(name) for name in ("flash-attn-4", "nvidia-cudnn-frontend")},
        "commit": options.commit or commit.stdout.strip(),
        "length": options.length,
        "documents": options.documents,
    }
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


def measure(options: argparse.Namespace, plan: str, rank: int) -> dict[str, list[float]]:
    """Return for each batch the milliseconds of its first attention and of the next ones, and the plans of cuDNN it made."""
    found: dict[str, list[float]] = {"first": [], "again": [], "plans": []}
    cudnn_varlen._plan.cache_clear()  # those of another rank, as all run in this process
    with as_rank(rank, options.ranks):
        group = groups_of(rank, options.ranks, 1)[0]
        for batch in range(options.batches):
            known = cudnn_varlen._plan.cache_info().misses
            attend = attention_of(options, plan, group, batch)
            seconds = []
            for _ in range(1 + AGAIN):
                synchronize(options.device)
                start = time.perf_counter()
                attend()
                synchronize(options.device)
                seconds.append(time.perf_counter() - start)
            found["first"].append(seconds[0] * 1e3)
            found["again"].append(statistics.median(seconds[1:]) * 1e3)
            found["plans"].append(cudnn_varlen._plan.cache_info().misses - known)
    return found


def attention_of(options: argparse.Namespace, plan: str, group: str, batch: int) -> Any:
    """Return a function that runs the forward and the backward of an attention of a batch."""
    strategy, layout = plan.split("/")
    cuts = sorted(random.Random(batch).sample(range(1, options.length), options.documents - 1))
    documents = torch.bucketize(torch.arange(options.length), torch.tensor(cuts), right=True)[None].to(options.device)
    axis = {"length": options.length, "layout": layout, "world_size": options.ranks, "group": group}
    q, k, v, dout = (
        torch.randn(
            1, options.length // options.ranks, heads, HEAD_DIM, dtype=torch.bfloat16, device=options.device
        ).transpose(1, 2)
        for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    names = (f"{strategy}_attention", f"{strategy}_attention_backward")
    forward, backward = (getattr(torch.ops.cpcompile, name).default for name in names)

    def attend() -> None:
        bounds = cpcompile.runtime.document_bounds(documents)
        terms = None, documents, None, HEAD_DIM**-0.5, True, 0, 0.0, 0.0, -1, bounds
        out, lse, *kept = forward(q, k, v, *terms, **axis)
        backward(dout, q, k, v, out, lse, kept, *terms, **axis)

    return attend


def slowest(of_ranks: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Return the times of the slowest rank in each batch, and their medians."""
    first, again = (list(map(max, *(each[name] for each in of_ranks))) for name in ("first", "again"))
    return {
        "first_ms": round(statistics.median(first), 2),
        "again_ms": round(statistics.median(again), 2),
        "each_first_ms": [round(x, 1) for x in first],
        "each_again_ms": [round(x, 1) for x in again],
        "plans_of_cudnn": [r["plans"] for r in of_ranks],
    }


if __name__ == "__main__":
    main()
