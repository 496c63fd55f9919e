"""Benchmark: a whole training step (forward, loss, backward) of a Llama with the sequence sharded over local GPUs.

    python benchmarks/train_step.py --ranks 2 --length 32768 --strategy ring ulysses gather --out
    benchmarks/results/train_step.json

Weights and tokens are random. Each strategy runs in the same processes; a step's time is that of the slowest
rank, the median over steps. `--limit` measures what a step must take at least: the fastest attention that this machine has on
the whole sequence over the number of ranks, as many layers in a row as make a step, and the compiled model without attention
on one rank's tokens; and beside it the same with cuDNN's attention. Without a strategy only the limit is measured, on one GPU.
With `--documents 16` each step has other documents, of random lengths; its limit is that of these documents, by one kernel
call for all of them, and `over_limit` is the median over steps of what a step takes of its own limit. `host_ms` is what the
host takes to launch a step.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import random
import socket
import statistics
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from memory_peak import peak_of
from step_trace import trace

import cpcompile
from cpcompile.choose.machine import Machine
from cpcompile.inspect.explanation import Explanation, memory_lines
from cpcompile.runtime import kernels
from cpcompile.runtime.kernels.block import Block

SHAPES = {
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}

WARM_UP = 2  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--layers", type=int, help="in place of those of the shape")
    parser.add_argument("--strategy", nargs="*", default=["ring", "ulysses"])
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--dynamic", action="store_true", help="one graph for all lengths")
    parser.add_argument("--documents", type=int, default=0, help="how many are packed, others in each step; 0: one")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoints", action="store_true", help="activation checkpoints of all layers")
    parser.add_argument("--single", action="store_true", help="also the untouched, compiled model on one device")
    parser.add_argument("--limit", action="store_true", help="also what a step must take at least")
    parser.add_argument("--options", type=json.loads, default={}, help='of cpcompile, {"memory_budget": 0.5}')
    parser.add_argument("--memory", action="store_true", help="print what the first rank holds at the peak of a step")
    parser.add_argument("--profile", type=Path, help="folder for a trace of one step of each strategy")
    parser.add_argument(
        "--ledger", action="store_true", help="also what a rank holds as predicted; with --steps 0 only that"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.predicted = {name: predicted(options, name) for name in options.strategy} if options.ledger else {}
    if not options.steps:
        return
    with socket.socket() as free:  # several runs may share a host
        free.bind(("127.0.0.1", 0))
        options.port = free.getsockname()[1]
    options.processes = options.ranks if options.strategy or options.single else 1
    torch.multiprocessing.start_processes(run, args=(options,), nprocs=options.processes, start_method="spawn")


def predicted(options: argparse.Namespace, strategy: str) -> float:
    """Print the ledger of a step, made without a GPU, and return its GiB at the peak."""
    return print_ledger(f"{strategy}, {options.length} tokens", plan_of(options, strategy))


def plan_of(options: argparse.Namespace, strategy: str, device: str | Machine = "") -> Explanation:
    """Return the plan of a step, with its memory and time, made without a GPU."""
    where = argparse.Namespace(**vars(options) | {"device": "meta"})
    model, ids = model_and_tokens(where, options.length, "sdpa")
    return cpcompile.explain(
        model,
        {"input_ids": ids, "labels": ids},
        world_size=options.ranks,
        memory=True,
        device=device,
        strategy=strategy,
        **{"optimizer_states": 0, "inner": options.inner} | options.options,
    )


def print_ledger(title: str, plan: Explanation) -> float:
    """Print the ledger of a plan, and return its GiB at the peak."""
    assert plan.memory is not None
    print(title, *memory_lines(plan.memory), sep="\n", flush=True)
    return round(plan.memory.peak / 2**30, 2)


def run(rank: int, options: argparse.Namespace) -> None:
    is_cuda = options.device == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{options.port}",
        rank=rank,
        world_size=options.processes,
    )
    mesh = dist.init_device_mesh(options.device, (options.processes,), mesh_dim_names=("cp",))
    rows: list[dict[str, Any]] = []
    plans = [(name, True) for name in options.strategy]
    for strategy, is_sharded in plans + ([("single device", False)] if options.single else []):
        row = measure(rank, options, mesh, strategy, is_sharded)
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
    if options.limit:
        rows.append(limit(options))
        for row in rows[:-1]:
            row["over_limit"] = over_limit(row["each_ms"], rows[-1]["each_ms"])
        if rank == 0:
            print(json.dumps(rows[-1]), flush=True)
    if rank == 0 and options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({**environment(options), "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


def measure(
    rank: int, options: argparse.Namespace, mesh: dist.DeviceMesh, strategy: str, is_sharded: bool
) -> dict[str, Any]:
    """Return the median step of one strategy, its first loss and its peak memory."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, ids = model_and_tokens(options, options.length, "sdpa")
    if is_sharded:
        plan = {"strategy": strategy, "inner": options.inner, "dynamic": options.dynamic}
        cpcompile.apply(model, mesh, **plan | options.options)
    else:
        model.forward = torch.compile(model.forward, dynamic=False)
    seconds, of_host, first_loss, gradient_norm = [], [], 0.0, 0.0
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(options.steps + WARM_UP):
        batch = {"input_ids": ids, "labels": ids, **packing(options, step)}
        dist.barrier()
        synchronize(options.device)
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        launched = time.perf_counter() - start
        synchronize(options.device)
        took = torch.tensor([time.perf_counter() - start, launched], device=options.device, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(took[0].item())
        of_host.append(took[1].item())
        first_loss = first_loss or loss.item()
        gradient_norm = gradient_norm or torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item()
        model.zero_grad(set_to_none=True)
    median = statistics.median(seconds[WARM_UP:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
    pinned = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) / 2**30 if options.device == "cuda" else 0.0
    if options.memory and options.device == "cuda":
        loss = None
        table = peak_of(lambda model=model: model(**batch).loss.backward())
        if rank == 0:
            print(f"{strategy}\n{table}", flush=True)
    if options.profile:
        trace(rank, options.profile, lambda model=model: model(**batch).loss.backward(), f"{strategy}_{options.length}")
    del model, loss
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return {
        "strategy": strategy,
        "ranks": options.ranks if is_sharded else 1,
        "length": options.length,
        "documents": options.documents,
        "checkpoints": options.checkpoints,
        "ms": round(median * 1e3, 2),
        "host_ms": round(statistics.median(of_host[WARM_UP:]) * 1e3, 2),
        "each_ms": [round(x * 1e3, 2) for x in seconds[WARM_UP:]],
        "tokens_per_second": round(options.length / median),
        "peak_gib": round(peak, 2),
        **({"predicted_gib": options.predicted[strategy]} if strategy in options.predicted else {}),
        "pinned_gib": round(pinned, 2),
        "compile_s": round(seconds[0], 1),
        "first_loss": first_loss,
        "gradient_norm": gradient_norm,
    }


def model_and_tokens(options: argparse.Namespace, length: int, attention: str) -> tuple[Any, torch.Tensor]:
    """Return the model, with activation checkpoints if asked for, and random tokens `[1, length]`."""
    config = transformers.LlamaConfig(
        **shape_of(options), max_position_embeddings=options.length, attn_implementation=attention, use_cache=False
    )
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.randint(config.vocab_size, (1, length))
    if options.checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, ids


def lengths_of(options: argparse.Namespace, step: int) -> tuple[int, ...]:
    """Return how long the documents of a step are, on all ranks alike."""
    cuts = random.Random(step).sample(range(1, options.length), options.documents - 1) if options.documents else []
    return tuple(b - a for a, b in pairwise((0, *sorted(cuts), options.length)))


def packing(options: argparse.Namespace, step: int) -> dict[str, torch.Tensor]:
    """Return the positions of the documents of a step, by which a model tells them apart; nothing for one document."""
    if not options.documents:
        return {}
    positions = torch.cat([torch.arange(length) for length in lengths_of(options, step)])
    return {"position_ids": positions[None].to(options.device)}


def over_limit(taken: list[float], limits: list[float]) -> float:
    """Return the median over steps of what they take over their limits."""
    return round(statistics.median(a / b for a, b in zip(taken, limits, strict=True)), 4)


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the shape of the model, with other layers if asked for."""
    return SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})


def limit(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a step must take at least: attention over the ranks, and the rest of the model on its tokens."""
    shape = shape_of(options)
    heads, key_heads, width = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    made = {"device": options.device, "dtype": torch.bfloat16, "requires_grad": True}
    q = torch.randn(1, heads, options.length, width, **made)
    k, v = (torch.randn(1, key_heads, options.length, width, **made) for _ in range(2))
    dout = torch.randn_like(q)

    layers = shape["num_hidden_layers"] / options.ranks
    calls = max(1, round(layers))  # in a row, as in a step: a GPU that rests between samples runs at a higher clock

    def seconds_of(lengths: tuple[int, ...], kernel: str) -> float:
        block = Block(width**-0.5, high=0, lengths=lengths)

        def attention() -> None:
            with torch.no_grad():
                for _ in range(calls):
                    out, lse = kernels.forward(q, k, v, block, kernel)
                    kernels.backward(dout, q, k, v, out, lse, block, kernel)

        return timed(attention, options) / calls * layers

    def each_step(kernel: str) -> list[float]:
        if not options.documents:
            return [seconds_of((), kernel)] * options.steps
        return [seconds_of(lengths_of(options, step), kernel) for step in range(WARM_UP, WARM_UP + options.steps)]

    each = each_step("auto")
    cudnn = "cudnn_varlen" if options.documents else "cudnn"
    of_cudnn = each_step(cudnn) if options.device == "cuda" else each

    def without(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return (q + (k + v).repeat_interleave(heads // key_heads, 1)).transpose(1, 2), None

    transformers.AttentionInterface.register("without", without)
    torch._dynamo.reset()
    model, ids = model_and_tokens(options, options.length // options.ranks, "without")
    model.forward = torch.compile(model.forward, dynamic=False)

    def rest() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    of_rest = timed(rest, options)
    of_attention = statistics.median(each)
    return {
        "strategy": "limit",
        "ms": round((of_attention + of_rest) * 1e3, 2),
        "attention_ms": round(of_attention * 1e3, 2),
        "cudnn_ms": round((statistics.median(of_cudnn) + of_rest) * 1e3, 2),
        "cudnn_attention_ms": round(statistics.median(of_cudnn) * 1e3, 2),
        "rest_ms": round(of_rest * 1e3, 2),
        "each_ms": [round((x + of_rest) * 1e3, 2) for x in each],
    }


def timed(run: Callable[[], None], options: argparse.Namespace) -> float:
    """Return the median seconds of a function."""
    seconds = []
    for _ in range(options.steps + WARM_UP):
        synchronize(options.device)
        start = time.perf_counter()
        run()
        synchronize(options.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on."""
    packages = {name: installed_version(name) for name in ("flash-attn-4", "nvidia-cudnn-frontend")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "packages": packages,
        "commit": options.commit or commit.stdout.strip(),
        "shape": options.shape,
        "dynamic": options.dynamic,
    }


if __name__ == "__main__":
    main()
