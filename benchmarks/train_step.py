"""Benchmark: a whole training step (forward, loss, backward) of a Llama with the sequence sharded over local GPUs.

    python benchmarks/train_step.py --ranks 2 --length 32768 --strategy ring ulysses gather --out
    benchmarks/results/train_step.json

Weights and tokens are random. Each strategy runs in the same processes; a step's time is that of the slowest
rank, the median over steps. The single-device step, where it fits, is the limit: its time divided by the
number of ranks.
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers

import cpcompile

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--strategy", nargs="*", default=["ring", "ulysses"])
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--dynamic", action="store_true", help="one graph for all lengths")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--checkpoints", action="store_true", help="activation checkpoints of all layers")
    parser.add_argument("--single", action="store_true", help="also the untouched, compiled model on one device")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default="", help="what to record; by default that of this checkout")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with socket.socket() as free:  # several runs may share a host
        free.bind(("127.0.0.1", 0))
        options.port = free.getsockname()[1]
    torch.multiprocessing.start_processes(run, args=(options,), nprocs=options.ranks, start_method="spawn")


def run(rank: int, options: argparse.Namespace) -> None:
    is_cuda = options.device == "cuda"
    if is_cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{options.port}",
        rank=rank,
        world_size=options.ranks,
    )
    mesh = dist.init_device_mesh(options.device, (options.ranks,), mesh_dim_names=("cp",))
    rows: list[dict[str, Any]] = []
    plans = [(name, True) for name in options.strategy]
    for strategy, is_sharded in plans + ([("single device", False)] if options.single else []):
        row = measure(rank, options, mesh, strategy, is_sharded)
        rows.append(row)
        if rank == 0:
            print(json.dumps(row), flush=True)
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
    config = transformers.LlamaConfig(
        **SHAPES[options.shape], max_position_embeddings=options.length, attn_implementation="sdpa", use_cache=False
    )
    with torch.device(options.device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.randint(config.vocab_size, (1, options.length))
    if options.checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if is_sharded:
        cpcompile.apply(model, mesh, strategy=strategy, inner=options.inner, dynamic=options.dynamic)
    else:
        model.forward = torch.compile(model.forward, dynamic=False)
    seconds, first_loss = [], 0.0
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps + 2):
        dist.barrier()
        synchronize(options.device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        synchronize(options.device)
        took = torch.tensor(time.perf_counter() - start, device=options.device, dtype=torch.float64)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        seconds.append(took.item())
        first_loss = first_loss or loss.item()
        model.zero_grad(set_to_none=True)
    median = statistics.median(seconds[2:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if options.device == "cuda" else 0.0
    del model, loss
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return {
        "strategy": strategy,
        "ranks": options.ranks if is_sharded else 1,
        "length": options.length,
        "checkpoints": options.checkpoints,
        "ms": round(median * 1e3, 2),
        "tokens_per_second": round(options.length / median),
        "peak_gib": round(peak, 2),
        "compile_s": round(seconds[0], 1),
        "first_loss": first_loss,
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def environment(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a result depends on."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": options.commit or commit.stdout.strip(),
        "shape": options.shape,
        "dynamic": options.dynamic,
    }


if __name__ == "__main__":
    main()
