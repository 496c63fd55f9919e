"""Loss: the cross entropy of a head, forward and backward, by ours in chunks, by other packages, and with all logits at once.

    python benchmarks/loss.py --out benchmarks/results/loss.json                          # on one GPU
    python benchmarks/loss.py --device cpu --tokens 32 --vocabulary 64 --features 16 --repeats 1 --out /tmp/loss.json

Each runs as a program has it: ours as Inductor compiles it, all logits at once compiled as well. What is not installed, or cannot
compute this loss exactly in these dtypes, has the reason in its row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

import cpcompile.runtime  # registers the operators
from cpcompile.analysis.patterns.cross_entropy import find_cross_entropy
from cpcompile.passes.chunk_losses import function_of_provider
from cpcompile.runtime.tiles.loss_body import Body, Result, add_body
from cpcompile.runtime.tiles.loss_providers import OWN, PROVIDERS, CrossEntropy, obstacle

assert cpcompile.runtime

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
Row = dict[str, Any]


def whole_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss with all logits, as models of transformers compute it."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum")


def own_body(dtype: torch.dtype) -> Body:
    """Return the body of that loss, of logits."""
    loss_dtype = torch.promote_types(dtype, torch.float32)
    graph = fx.Graph()
    logits, labels = graph.placeholder("logits"), graph.placeholder("labels")
    cast = graph.call_function(torch.ops.aten.to.dtype, (logits, loss_dtype))
    loss = graph.call_function(torch.ops.aten.cross_entropy_loss.default, (cast, labels, None, 2))
    graph.output((loss,))
    return Body(fx.GraphModule({}, graph), (Result(None, loss_dtype, True),))


def our_operator(body: Body, chunk: int, compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return what calls the operator of a transformed graph."""
    key = add_body(body)

    def call(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        (loss,) = torch.ops.cpcompile.chunked_loss(hidden, weight, None, [labels], [], key, chunk, compiled)
        return loss  # type: ignore[no-any-return]

    return call


def runner(name: str, hidden: Tensor, weight: Tensor, labels: Tensor, options: argparse.Namespace) -> Any:
    """Return the function of a row, or why it cannot be."""
    body = own_body(hidden.dtype)
    if name == "whole":
        return torch.compile(whole_loss)
    if name == OWN:
        body.compile(hidden.new_empty(options.chunk, weight.shape[0]), [labels.new_zeros(options.chunk)], [], {})
        return our_operator(body, options.chunk, True)
    loss = CrossEntropy(hidden.device.type, hidden.dtype, body.results[0].dtype)
    if reason := obstacle(name, loss):
        return f"{name} {reason}"
    graph = body.function.graph
    found = find_cross_entropy(graph, hidden.dtype, [labels])
    function = function_of_provider(graph, found, loss, options.chunk, name)
    return our_operator(Body(function, body.results, name), options.chunk, False)


def measured(name: str, tokens: int, features: int, options: argparse.Namespace) -> Row:
    """Return a row: milliseconds of forward and backward, and what they hold at the peak beside their operands."""
    row: Row = {"provider": name, "tokens": tokens, "features": features, "vocabulary": options.vocabulary}
    torch.manual_seed(0)
    like = {"device": options.device, "dtype": DTYPES[options.dtype]}
    hidden = torch.randn(tokens, features, **like).requires_grad_()
    weight = (torch.randn(options.vocabulary, features, **like) / features**0.5).requires_grad_()
    labels = torch.randint(options.vocabulary, (tokens,), device=options.device)
    labels[::7] = -100
    run = runner(name, hidden, weight, labels, options)
    if isinstance(run, str):
        return row | {"error": run}

    def step() -> list[Tensor]:
        loss = run(hidden, weight, labels) / tokens
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    try:
        for _ in range(2):
            found = step()
        if options.check:
            row["error_rms"] = errors(found, hidden, weight, labels)
        del found
        times = [timed(step, options.device) for _ in range(options.repeats)]
    except torch.cuda.OutOfMemoryError as error:
        return row | {"error": str(error).splitlines()[0]}
    row["ms"] = round(median(times), 3)
    if options.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        row["peak_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 3)
    return row


def errors(found: list[Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> list[float]:
    """Return the error of loss and gradients against float64, root mean square, in chunks of tokens."""
    of_weight, total = torch.zeros_like(weight, dtype=torch.float64), 0.0
    w = weight.detach().double().requires_grad_()
    of_hidden = []
    for x, y in zip(hidden.detach().split(1024), labels.split(1024), strict=True):
        x = x.double().requires_grad_()
        loss = whole_loss(x, w, y) / labels.numel()
        gx, gw = torch.autograd.grad(loss, (x, w))
        total += float(loss.detach())
        of_weight += gw
        of_hidden.append(gx)
    exact = [torch.tensor(total, dtype=torch.float64, device=hidden.device), torch.cat(of_hidden), of_weight]
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


def timed(step: Callable[[], Any], device: str) -> float:
    """Return the milliseconds of a step."""
    if device != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def environment(options: argparse.Namespace) -> Row:
    """Return what the numbers were measured with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    versions = {}
    for package in ("liger-kernel", "cut-cross-entropy", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": versions,
        "dtype": options.dtype,
        "chunk": options.chunk,
        "repeats": options.repeats,
        "commit": options.commit or commit.stdout.strip(),
    }


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--features", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--chunk", type=int, default=4096, help="loss_chunk: tokens whose logits are in memory at once")
    parser.add_argument(
        "--providers", nargs="+", default=[OWN, *PROVIDERS, "whole"], choices=[OWN, *PROVIDERS, "whole"]
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="errors of loss and gradients against float64 as well")
    parser.add_argument("--commit", default="", help="of the code, where there is no git")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    options = parsed(arguments)
    rows = []
    for tokens in options.tokens:
        for features in options.features:
            for name in options.providers:
                rows.append(measured(name, tokens, features, options))
                print(rows[-1], flush=True)
                options.out.write_text(json.dumps({"environment": environment(options), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
