"""Benchmark: kernels of attention alone on one GPU, forward and backward, beside each other.

    python benchmarks/kernels.py --kernels cudnn flash4 --out benchmarks/results/flash_attention_4.json

Causal attention, all pairs and packed documents of equal length, in bfloat16. Times are medians of device events. Errors are
those of out, log-sum-exp, dq, dk and dv against the first kernel's, relative by norms.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_step import installed_version

from cpcompile.runtime import kernels
from cpcompile.runtime.kernels.block import Block

WARM_UP, REPEATS = 2, 5
PACKAGES = ("flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cudnn-frontend")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=kernels.NAMES, default=["cudnn", "flash4"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = [row for head_dim in options.head_dims for row in measure(options, head_dim)]
    if options.out:
        packages = {name: installed_version(name) for name in PACKAGES}
        known = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "packages": packages}
        sizes = {"tokens": options.tokens, "heads": options.heads, "key_heads": options.key_heads, "dtype": "bfloat16"}
        options.out.write_text(json.dumps(known | sizes | {"rows": rows}, indent=1) + "\n")


def measure(options: argparse.Namespace, head_dim: int) -> list[dict[str, Any]]:
    """Return a row for each case, with the milliseconds of each kernel."""
    tokens, documents = options.tokens, options.documents

    def made(heads: int) -> torch.Tensor:
        return torch.randn(1, tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    q, dout = made(options.heads), made(options.heads)
    k, v = made(options.key_heads), made(options.key_heads)
    lengths = (tokens // documents,) * documents
    cases = {
        "causal": Block(head_dim**-0.5, high=0),
        "all pairs": Block(head_dim**-0.5),
        f"{documents} documents of {tokens // documents}": Block(head_dim**-0.5, high=0, lengths=lengths),
    }
    rows = []
    for name, block in cases.items():
        row: dict[str, Any] = {"head_dim": head_dim, "case": name}
        first: tuple[torch.Tensor, ...] = ()
        for asked in options.kernels:
            kernel = "cudnn_varlen" if asked == "cudnn" and block.lengths else asked  # the same library
            forward = functools.partial(kernels.forward, q, k, v, block, kernel)
            out, lse = forward()
            backward = functools.partial(kernels.backward, dout, q, k, v, out, lse, block, kernel)
            found = (out, lse, *backward())
            row[kernel] = {
                "forward_ms": milliseconds(forward),
                "backward_ms": milliseconds(backward),
                "errors": [float(f"{relative(x, y):.1e}") for x, y in zip(found, first or found, strict=True)],
            }
            first = first or found
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def relative(x: torch.Tensor, y: torch.Tensor) -> float:
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


def milliseconds(run: Callable[[], Any]) -> float:
    """Return the median of what the device takes."""
    taken = []
    for _ in range(WARM_UP + REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return round(statistics.median(taken[WARM_UP:]), 2)


if __name__ == "__main__":
    main()
